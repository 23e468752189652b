"""Files that commands write."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cli.errors import CommandError


def write_output(path: str, text: str, console: Console) -> None:
    """Raises `CommandError`."""
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}.") from error
    console.print(f"written to {path}", soft_wrap=True)
