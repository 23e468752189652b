"""The options of the configuration tree, read off the dataclasses of `engine/config.py`."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from engine.config import Config

ENVIRONMENT_PREFIX = "FORESIGHT_"


@dataclass(frozen=True, slots=True)
class Option:
    """One leaf of the tree, under all its names."""

    path: tuple[str, ...]  # in the YAML file: ("engine", "cache", "page_size")
    type: Any  # as annotated: int, str | None, tuple[str, ...]
    default: Any
    help: str
    aliases: tuple[str, ...]  # further flags, without dashes
    opposites: tuple[str, ...]  # flags that turn it off, without dashes
    choices: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def key(self) -> str:
        """As written in messages and documentation: `engine.cache.page_size`."""
        return ".".join(self.path)

    @property
    def flags(self) -> tuple[str, ...]:
        names = (self.name.replace("_", "-"), *self.aliases)
        return tuple(f"-{name}" if len(name) <= 2 else f"--{name}" for name in names)

    @property
    def off_flags(self) -> tuple[str, ...]:
        return tuple(f"--{flag}" for flag in self.opposites)

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.type) is tuple

    @property
    def is_bool(self) -> bool:
        return self.type is bool

    @property
    def type_name(self) -> str:
        """For people: `int`, `text`, `list of text`."""
        if self.is_list:
            return "list of text"
        plain = [kind for kind in _members(self.type) if kind is not types.NoneType]
        return "text" if plain == [str] else " or ".join(kind.__name__ for kind in plain)


def _members(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


@cache
def options() -> tuple[Option, ...]:
    """Every option, in the order of the tree."""
    return tuple(_walk(Config, ()))


def _walk(node: type, path: tuple[str, ...]) -> Iterator[Option]:
    annotations = typing.get_type_hints(node)
    for field in dataclasses.fields(node):
        annotation, here = annotations[field.name], (*path, field.name)
        if dataclasses.is_dataclass(annotation):
            assert isinstance(annotation, type)
            yield from _walk(annotation, here)
        else:
            meta = field.metadata
            yield Option(
                here,
                annotation,
                field.default,
                meta["help"],
                meta["aliases"],
                meta["opposites"],
                meta["choices"],
            )
