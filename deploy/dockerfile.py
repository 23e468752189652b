"""Reads a Dockerfile and a .dockerignore, as far as this project's use of them goes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, continuation lines joined."""

    name: str  # upper case
    text: str  # everything after the name

    @property
    def words(self) -> list[str]:
        """The exec form's words. Raises `ValueError` for the shell form."""
        return json.loads(self.text)


@dataclass(frozen=True, slots=True)
class Stage:
    """One `FROM … AS name` and what follows it."""

    name: str
    base: str  # an image, or another stage's name
    instructions: list[Instruction] = field(default_factory=list)


def parse(text: str) -> dict[str, Stage]:
    """The stages by name, in order. Raises `ValueError` for a stage without a name."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(_without_comments(text)))
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for line in filter(None, joined.splitlines()):
        name, _, rest = line.strip().partition(" ")
        name, rest = name.upper(), rest.strip()
        if name == "FROM":
            base, separator, alias = re.sub(
                r"\$\{(\w+)\}", lambda match: arguments[match[1]], rest
            ).partition(" AS ")
            if not separator:
                raise ValueError(f"a stage without a name: {line}")
            stages[alias] = Stage(alias, base)
        elif not stages:
            if name != "ARG":
                raise ValueError(f"{name} before the first FROM")
            key, _, value = rest.partition("=")
            arguments[key] = value
        else:
            next(reversed(stages.values())).instructions.append(Instruction(name, rest))
    return stages


def _without_comments(text: str) -> Iterable[str]:
    return (line.rstrip() for line in text.splitlines() if not line.lstrip().startswith("#"))


def steps(stages: dict[str, Stage], target: str) -> list[Instruction]:
    """Everything that makes the target's image, its base stages first.

    Raises `KeyError` when there is no such stage.
    """
    stage = stages[target]
    before = steps(stages, stage.base) if stage.base in stages else []
    return [*before, *stage.instructions]


def base_image(stages: dict[str, Stage], target: str) -> str:
    """The image that the target's first base stage starts from."""
    stage = stages[target]
    return base_image(stages, stage.base) if stage.base in stages else stage.base


def last(instructions: Sequence[Instruction], name: str) -> Instruction:
    """The one that counts of an instruction that overrides earlier ones. Raises `LookupError`."""
    found = [instruction for instruction in instructions if instruction.name == name]
    if not found:
        raise LookupError(f"the Dockerfile has no {name}")
    return found[-1]


def health_command(instructions: Sequence[Instruction]) -> list[str]:
    """The exec-form command of HEALTHCHECK."""
    return json.loads(last(instructions, "HEALTHCHECK").text.partition("CMD ")[2])


def in_context(path: str, ignore: str) -> bool:
    """Whether `path` is sent to the builder under these .dockerignore rules; the last one wins."""
    kept = True
    for rule in filter(None, _without_comments(ignore)):
        pattern = rule.lstrip("!").rstrip("/")
        inside = path == pattern or path.startswith(pattern + "/")
        if pattern.startswith("**/"):
            inside = any(fnmatch(part, pattern[3:]) for part in path.split("/"))
        elif "*" in pattern:
            inside = fnmatch(path, pattern)
        if inside:
            kept = rule.startswith("!")
    return kept
