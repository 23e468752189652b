"""Where a checkpoint's text files are, for the API process, which never needs its weights."""

from __future__ import annotations

from pathlib import Path

from cli.errors import CommandError

TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


def text_folder(model: str, revision: str | None) -> Path:
    """The folder itself, or the hub's snapshot of its text files. Raises `CommandError`."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=TEXT_FILES))
    except Exception as error:  # network, authentication, unknown id: many unrelated types
        raise CommandError(f"the tokenizer of {model} cannot be downloaded ({error}).") from error
