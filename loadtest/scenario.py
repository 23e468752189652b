"""A scenario: kinds of requests with their lengths and weights, pauses, and latency targets."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

folder = Path(__file__).parent / "scenarios"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request; kinds are drawn by weight, lengths evenly between their bounds."""

    name: str
    endpoint: str  # "chat" or "completion"
    weight: float = 1.0
    turns: int = 1  # of one conversation; each turn sends the whole history again
    prompt_chars: tuple[int, int] = (100, 400)  # of a completion; about four characters a token
    output_tokens: tuple[int, int] = (32, 64)

    def __post_init__(self) -> None:
        if self.endpoint not in ("chat", "completion"):
            raise ValueError(f"{self.name}: endpoint must be chat or completion")
        if self.weight <= 0 or self.turns < 1 or (self.turns > 1 and self.endpoint != "chat"):
            raise ValueError(f"{self.name}: weight must be positive, several turns need chat")
        for low, high in (self.prompt_chars, self.output_tokens):
            if not 1 <= low <= high:
                raise ValueError(f"{self.name}: a range must be [low, high] with 1 <= low <= high")


@dataclass(frozen=True, slots=True)
class Slo:
    """A request is good when it stays within both."""

    ttft_ms: float = 1000.0  # time to first token
    inter_token_ms: float = 100.0  # the request's median time between tokens


@dataclass(frozen=True, slots=True)
class Scenario:
    """What one simulated user does, again and again."""

    name: str
    about: str
    kinds: tuple[Kind, ...]
    think_seconds: float = 1.0  # mean of the exponential pause between conversations
    slo: Slo = field(default_factory=Slo)

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError(f"{self.name}: a scenario needs at least one kind")


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    known = {f.name for f in fields(cls)}
    if unknown := values.keys() - known:
        raise ValueError(f"{where}: unknown key {', '.join(sorted(unknown))}")
    pairs = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return cls(**pairs)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def load(path: Path) -> Scenario:
    """Reads one YAML file. Raises `ValueError` for anything but a complete scenario."""
    raw = yaml.safe_load(path.read_text())
    if not isinstance(raw, dict):
        raise ValueError(f"{path.name}: not a mapping")
    where = path.name
    raw["kinds"] = [_build(Kind, kind, where) for kind in raw.get("kinds", [])]
    raw["slo"] = _build(Slo, raw.get("slo", {}), where)
    return _build(Scenario, {"name": path.stem} | raw, where)


def load_all() -> dict[str, Scenario]:
    """The bundled scenarios by name."""
    return {path.stem: load(path) for path in sorted(folder.glob("*.yaml"))}
