"""What a checkpoint's generation_config.json says of default sampling and of its end tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Defaults of fields a client left out (None: the checkpoint does not say), and end tokens."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    end_ids: frozenset[int] = frozenset()


def load_generation(folder: Path, tokenizer_eos: int | None) -> GenerationDefaults:
    """Read generation_config.json; end tokens also come from config.json and the tokenizer.

    A checkpoint that does not sample by default (`do_sample: false` beside no temperature) is not
    made greedy: API clients expect temperature 1, as other servers do.
    """
    generation = _read(folder / "generation_config.json")
    ends = _ids(generation.get("eos_token_id")) or _ids(
        _read(folder / "config.json").get("eos_token_id")
    )
    if tokenizer_eos is not None:
        ends.add(tokenizer_eos)
    top_k = _number(generation, "top_k")
    limit = _number(generation, "max_new_tokens")
    return GenerationDefaults(
        temperature=_number(generation, "temperature"),
        top_p=_number(generation, "top_p"),
        top_k=None if top_k is None else int(top_k),
        min_p=_number(generation, "min_p"),
        repetition_penalty=_number(generation, "repetition_penalty"),
        max_new_tokens=None if limit is None else int(limit),
        end_ids=frozenset(ends),
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _number(source: dict[str, Any], name: str) -> float | None:
    value = source.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _ids(value: object) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {v for v in values if isinstance(v, int) and not isinstance(v, bool)}
