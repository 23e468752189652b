"""Traces: what arrived when, and how long it was. One JSON object a line, see docs/simulation.md.

Arrivals need not be in order in a file (logs of several servers put together are not): they are
sorted when it is read, those of the same instant staying as they were.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

MOST_TOKENS = 1 << 24  # of one prompt or answer: more is a mistake


class TraceError(ValueError):
    """A line that cannot be used. The message is one sentence that begins with its number."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    `output_tokens` is the true length, an end token included where one ended it: with
    `output_tokens == max_tokens` it ended for length, otherwise by itself. The first
    `prefix_tokens` of the prompt are the same for all requests of a `prefix_group`, and its
    answers go on in the same way; so the whole prompt may be prefix, as in the turns of one
    conversation, where each prompt holds the prompt and the answer before.
    """

    arrival: float  # seconds from the start of the trace
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    prefix_group: str | None = None
    prefix_tokens: int = 0
    tenant: str = ""
    priority: int = 0  # lower runs sooner
    # For each output token whether a draft of it would be right, as "1" or "0"; where it ends, no
    # draft is. It depends on the text alone, so a recorded one holds for every draft length.
    right: str = ""

    def __post_init__(self) -> None:
        def check(ok: bool, what: str) -> None:
            if not ok:
                raise ValueError(what)

        check(math.isfinite(self.arrival), "arrival must be a finite number of seconds")
        check(self.arrival >= 0, "arrival must not be negative")
        check(self.prompt_tokens >= 1, "prompt_tokens must be at least 1")
        check(self.output_tokens >= 1, "output_tokens must be at least 1")
        check(self.max_tokens >= 1, "max_tokens must be at least 1")
        check(
            self.output_tokens <= self.max_tokens,
            f"output_tokens ({self.output_tokens}) is more than max_tokens ({self.max_tokens})",
        )
        check(self.prefix_tokens >= 0, "prefix_tokens must not be negative")
        check(
            self.prefix_tokens <= self.prompt_tokens,
            f"prefix_tokens ({self.prefix_tokens}) is more than prompt_tokens "
            f"({self.prompt_tokens})",
        )
        check(
            not self.prefix_tokens or self.prefix_group is not None,
            "prefix_tokens needs a prefix_group",
        )
        check(not set(self.right) - {"0", "1"}, "right must consist of 0 and 1")


_KINDS = {field.name: str(field.type) for field in fields(TraceRequest)}
_NEEDED = ("arrival", "prompt_tokens", "output_tokens", "max_tokens")


def parse_trace(lines: Iterable[str]) -> list[TraceRequest]:
    """The requests by arrival. Blank lines are skipped. Raises `TraceError`."""
    requests = [_parse(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise TraceError("the trace holds no request")
    return sorted(requests, key=lambda request: request.arrival)


def dump_trace(requests: Iterable[TraceRequest]) -> Iterator[str]:
    """The lines of a trace file, without what is at its default."""
    for request in requests:
        values = {
            field.name: getattr(request, field.name)
            for field in fields(TraceRequest)
            if field.name in _NEEDED or getattr(request, field.name) != field.default
        }
        yield json.dumps(values, ensure_ascii=False)


def merge(*traces: Iterable[TraceRequest]) -> list[TraceRequest]:
    """Several traces as one, by arrival."""
    return sorted((r for trace in traces for r in trace), key=lambda request: request.arrival)


def at_rate(trace: Iterable[TraceRequest], rate: float) -> list[TraceRequest]:
    """The same requests, arriving faster or slower: so that `rate` of them arrive per second.

    They must not all arrive at once.
    """
    trace = list(trace)
    factor = mean_rate(trace) / rate
    return [replace(request, arrival=request.arrival * factor) for request in trace]


def mean_rate(trace: Iterable[TraceRequest]) -> float:
    """Requests per second. Infinite where all arrive at once."""
    arrivals = [request.arrival for request in trace]
    span = max(arrivals) - min(arrivals)
    # n arrivals have n - 1 gaps; a lone request says nothing, and counts as one a second.
    return 1.0 if len(arrivals) == 1 else (len(arrivals) - 1) / span if span else math.inf


def _parse(line: str, number: int) -> TraceRequest:
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("a request must be a JSON object")
        known = {name: _value(values.pop(name), name) for name in _KINDS if name in values}
        if values:
            raise ValueError(f"{next(iter(values))!r} is no field of a request")
        missing = [name for name in _NEEDED if name not in known]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        return TraceRequest(**known)
    except json.JSONDecodeError as error:
        raise TraceError(f"line {number}: this is no JSON ({error.msg})") from error
    except ValueError as error:
        raise TraceError(f"line {number}: {error}") from error
    except RecursionError as error:
        raise TraceError(f"line {number}: this is nested too deeply") from error


def _value(value: Any, name: str) -> Any:
    """A field as its type, or `ValueError`. Groups may be numbers in the file."""
    kind = _KINDS[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "float":
        if not number:
            raise ValueError(f"{name} must be a number")
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if kind == "int":
        if number and abs(value) <= MOST_TOKENS and value == int(value):
            return int(value)
        if number and abs(value) > MOST_TOKENS:
            raise ValueError(f"{name} is more than {MOST_TOKENS}")
        raise ValueError(f"{name} must be a whole number")
    if kind == "str | None" and (value is None or (isinstance(value, int) and number)):
        return None if value is None else str(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text")
    return value
