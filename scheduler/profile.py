"""`Profile`: what steps of given shapes cost on one machine, as a table and as a JSON file.

Measured by `foresight profile`, or made by `Profile.roofline` from data sheets, in which case
`kind` says so wherever the profile is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

VERSION = 1
MEASURED = "measured"
ROOFLINE = "roofline model"  # computed from data sheets, never measured
_FACTS = ("machine", "device", "model", "dtype", "date")
_COUNTS = ("rows", "tokens", "decode_context", "chunk_pairs")


class ProfileError(ValueError):
    """The text is no usable profile. The message is one sentence."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the cost of a step depends on."""

    rows: int = 0  # sequences with a row in the step
    tokens: int = 0  # tokens computed: 1 + drafts of each live row, and the chunks
    decode_context: int = 0  # KV positions read by live rows, summed
    chunk_pairs: int = 0  # positions attended, summed over the tokens of chunks and over drafts

    def with_chunk(self, tokens: int, context: int) -> StepShape:
        """The shape with one more row: a chunk of so many tokens after `context` positions."""
        return StepShape(
            self.rows + 1,
            self.tokens + tokens,
            self.decode_context,
            self.chunk_pairs + chunk_pairs(tokens, context),
        )

    def with_drafts(self, drafts: int, live: int) -> StepShape:
        """The shape with so many drafts more, of `live` rows together; or fewer, if negative.

        A draft reads what the row reads, once more: a device short of compute rather than of
        bandwidth takes the time of it again.
        """
        pairs = abs(drafts) * self.decode_context // live if live else 0
        return StepShape(
            self.rows,
            self.tokens + drafts,
            self.decode_context,
            self.chunk_pairs + (pairs if drafts > 0 else -pairs),
        )


def chunk_pairs(tokens: int, context: int) -> int:
    """Positions attended by a chunk that follows `context` others: each token sees itself too."""
    return tokens * context + tokens * (tokens + 1) // 2


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds of steps and of page copies on one machine. The tables are checked at construction.

    `copies` tells the seconds to copy so many KV pages between device and host memory, one way.
    """

    points: tuple[tuple[StepShape, float], ...]
    copies: tuple[tuple[int, float], ...] = ()
    page_size: int = 0  # token positions; 0 where no pages were copied
    page_bytes: int = 0  # of one page, all layers
    kind: str = MEASURED
    machine: str = ""
    device: str = ""
    model: str = ""
    dtype: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        _check(bool(self.points), "the profile has no points")
        _check(self.kind in (MEASURED, ROOFLINE), f"the profile has an unknown kind, {self.kind!r}")
        _check(min(self.page_size, self.page_bytes) >= 0, "a page size is negative")
        for shape, seconds in self.points:
            _check_seconds(f"the step of {shape.rows} rows and {shape.tokens} tokens", seconds)
            _check(
                1 <= shape.rows <= shape.tokens,
                f"a step of {shape.rows} rows has {shape.tokens} tokens: each row has at least one",
            )
            _check(min(shape.decode_context, shape.chunk_pairs) >= 0, "a context is negative")
        for pages, seconds in self.copies:
            _check(pages >= 1, f"a copy of {pages} pages is no copy")
            _check_seconds(f"the copy of {pages} pages", seconds)
        _once("step", (shape for shape, _ in self.points))
        _once("copy of pages", (pages for pages, _ in self.copies))

    @property
    def label(self) -> str:
        """One line for reports: which model on what, and whether that was measured."""
        what = f"{self.model or 'unnamed model'} ({self.dtype or 'unknown dtype'})"
        where = ", ".join(fact for fact in (self.device, self.machine) if fact) or "unnamed machine"
        when = f", {self.date}" if self.date else ""
        return f"{self.kind}: {what} on {where}{when}"

    @classmethod
    def roofline(
        cls,
        *,
        weight_bytes: float,
        parameters: float,
        kv_bytes_per_token: float,
        bandwidth: float,
        flops: float,
        flops_per_pair: float = 0.0,
        overhead: float = 0.0,
        host_bandwidth: float = 0.0,
        page_size: int = 16,
        model: str = "",
        dtype: str = "",
        device: str = "",
    ) -> Profile:
        """A model of hardware from its data sheet, not a measurement: see `kind`.

            overhead + max(weight_bytes / bandwidth, 2 · parameters · tokens / flops)
              + kv_bytes_per_token · decode_context / bandwidth
              + flops_per_pair · chunk_pairs / flops

        `parameters` are those a token is multiplied with; `flops_per_pair` is 4 · layers · heads ·
        head size; rates are per second. Copies go at `host_bandwidth`; 0 leaves them out.
        """
        ridge = max(1, round(weight_bytes / bandwidth * flops / (2 * parameters)))
        positions = 1 << 20
        points = []
        for tokens in sorted({1, *(max(1, ridge * 4**k // 16) for k in range(6))}):
            work = max(weight_bytes / bandwidth, 2 * parameters * tokens / flops)
            read = kv_bytes_per_token * positions / bandwidth
            attended = flops_per_pair * positions / flops
            for context, pairs in ((0, 0), (positions, 0), (0, positions)):
                seconds = overhead + work + read * (context > 0) + attended * (pairs > 0)
                points.append((StepShape(1, tokens, context, pairs), seconds))
        page_bytes = round(kv_bytes_per_token * page_size)
        copies = [(n, n * page_bytes / host_bandwidth) for n in (1, 1024) if host_bandwidth > 0]
        facts = {"model": model, "dtype": dtype, "device": device}
        return cls(tuple(points), tuple(copies), page_size, page_bytes, ROOFLINE, **facts)

    # --- as a file ------------------------------------------------------------------------------

    def dump(self) -> str:
        """JSON that `parse` reads; a line a point."""
        facts = {name: getattr(self, name) for name in ("kind", *_FACTS)}
        head = {"version": VERSION, **facts}
        head |= {"page_size": self.page_size, "page_bytes": self.page_bytes}
        points = [json.dumps({**asdict(shape), "seconds": s}) for shape, s in self.points]
        copies = [json.dumps({"pages": pages, "seconds": s}) for pages, s in self.copies]
        lines = [f'  "{name}": {json.dumps(value)},' for name, value in head.items()]
        lines += [f'  "points": {_block(points)},', f'  "copies": {_block(copies)}']
        return "{\n" + "\n".join(lines) + "\n}\n"

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Reads what `dump` wrote. Raises `ProfileError`."""
        try:
            data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        except json.JSONDecodeError as problem:
            raise ProfileError(f"the profile is not JSON: {problem}") from None
        _check(isinstance(data, dict), "the profile is not a JSON object")
        version = data.pop("version", None)
        _check(version == VERSION, f"the profile has version {version!r}; this reads {VERSION}")
        known = ("kind", *_FACTS, "page_size", "page_bytes", "points", "copies")
        for key in data:
            _check(key in known, f"the profile has an unknown key, {key!r}")
        facts = {name: _fact(data, name) for name in ("kind", *_FACTS) if name in data}
        points = [
            (StepShape(*(_count(entry, name) for name in _COUNTS)), _seconds(entry))
            for entry in _entries(data, "points", _COUNTS)
        ]
        copies = [
            (_count(entry, "pages"), _seconds(entry))
            for entry in _entries(data, "copies", ("pages",))
        ]
        return cls(
            tuple(points),
            tuple(copies),
            _count(data, "page_size", 0),
            _count(data, "page_bytes", 0),
            **facts,
        )


def _check(ok: bool, what: str) -> None:
    if not ok:
        raise ProfileError(what)


def _check_seconds(what: str, seconds: float) -> None:
    ok = math.isfinite(seconds) and seconds > 0
    _check(ok, f"{what} takes {seconds} seconds; a time must be a positive number")


def _once(what: str, keys: Iterable[object]) -> None:
    seen = set()
    for key in keys:
        _check(key not in seen, f"a {what} is given twice: {key}")
        seen.add(key)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _once("key of the profile", (key for key, _ in pairs))
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ProfileError(f"the profile has the number {name}")


def _block(lines: list[str]) -> str:
    return "[\n    " + ",\n    ".join(lines) + "\n  ]" if lines else "[]"


def _entries(data: dict[str, Any], table: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    entries = data.get(table, [])
    _check(isinstance(entries, list), f"the profile's {table} are not a list")
    for entry in entries:
        _check(isinstance(entry, dict), f"an entry of the profile's {table} is not an object")
        for key in entry:
            _check(key in (*names, "seconds"), f"an entry of {table} has an unknown key, {key!r}")
    return entries


def _fact(data: dict[str, Any], name: str) -> str:
    _check(isinstance(data[name], str), f"the profile's {name} is not a string")
    return data[name]


def _count(data: dict[str, Any], name: str, default: int | None = None) -> int:
    value: Any = data.get(name, default)
    _check(type(value) is int, f"the profile has {value!r} where {name} should be a whole number")
    return int(value)


def _seconds(entry: dict[str, Any]) -> float:
    value: Any = entry.get("seconds")
    _check(
        type(value) in (int, float), f"the profile has {value!r} where seconds should be a number"
    )
    return float(value)
