"""Everything of a checkpoint that is about text, loaded once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from text.chat_template import ChatTemplate, load_chat_template
from text.generation import GenerationDefaults, load_generation
from text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextAssets:
    """A checkpoint's tokenizer, chat template (None: a base model) and generation defaults."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    generation: GenerationDefaults


def load_text(folder: Path, chat_template: Path | None = None) -> TextAssets:
    """Read a checkpoint folder. `chat_template`: a Jinja file to use instead of the checkpoint's.

    Raises `TokenizerError`, `TemplateError`, `OSError`.
    """
    tokenizer = Tokenizer.load(folder)
    return TextAssets(
        tokenizer=tokenizer,
        template=load_chat_template(folder, tokenizer.special_tokens, chat_template),
        generation=load_generation(folder, tokenizer.eos_id),
    )
