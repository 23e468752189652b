"""What a simulation has seen: a record per request, a timeline, and the report made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scheduler.request import Finish, FinishReason, Load, Occupancy
from scheduler.trace import TraceRequest

NATURAL = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class Targets:
    """What a request must meet to count as good, in seconds."""

    ttft: float = math.inf  # from arrival to the first token
    mtpot: float = math.inf  # the largest gap between two tokens, pauses included

    def __post_init__(self) -> None:
        for name in ("ttft", "mtpot"):
            if not getattr(self, name) > 0:
                raise ValueError(f"the {name} target must be a positive number of seconds")


class Record:
    """One request's fate. Times are seconds of the trace."""

    __slots__ = (
        "admitted",
        "ended",
        "first_token",
        "gap",
        "last",
        "output_tokens",
        "preemptions",
        "reason",
        "refused",
        "request",
    )

    def __init__(self, request: TraceRequest) -> None:
        self.request = request
        self.last = math.inf  # when the newest token came; none has
        self.gap = 0.0  # the largest between two tokens
        self.admitted: float | None = None
        self.first_token: float | None = None
        self.ended: float | None = None
        self.reason = ""  # a FinishReason; empty while it runs, or where it was refused
        self.refused = ""  # why
        self.output_tokens = 0
        self.preemptions = 0

    @property
    def ttft(self) -> float:
        """Infinite when no token ever came."""
        return math.inf if self.first_token is None else self.first_token - self.request.arrival

    def refuse(self, why: str, now: float) -> None:
        self.refused, self.ended = why, now

    def finish(self, finish: Finish) -> None:
        self.ended, self.reason = finish.finished, finish.reason
        self.admitted, self.first_token = finish.admitted, finish.first_token
        self.output_tokens = finish.completion_tokens
        self.preemptions = finish.preemptions

    def met(self, targets: Targets) -> bool:
        """Whether it ended by itself and in time."""
        return self.reason in NATURAL and self.ttft <= targets.ttft and self.gap <= targets.mtpot


class Timeline:
    """Gauges over time: time-weighted means over intervals of equal length, and totals."""

    COLUMNS = ("used", "running", "waiting", "reserve")  # used and reserve are shares of all pages

    def __init__(self, interval: float) -> None:
        if not 0 < interval < math.inf:
            raise ValueError("the interval of a timeline must be a positive number of seconds")
        self.interval = interval
        self.steps = 0  # settled
        self.step_seconds = 0.0  # of all of them
        self.rows: list[list[float]] = []  # per interval: COLUMNS, evictions, mean step seconds
        self._sums = [0.0] * len(self.COLUMNS)
        self._gauges = [0.0] * len(self.COLUMNS)  # since `_now`
        self._now = 0.0
        self._before = (0, 0, 0.0)  # preemptions, steps, their seconds at the interval's start
        self._preemptions = 0

    def note(self, now: float, found: Occupancy) -> None:
        """The gauges as they are from `now` on."""
        while now >= (end := (len(self.rows) + 1) * self.interval):
            self._advance(end)
            self._close()
        self._advance(now)
        *self._gauges, self._preemptions = found

    def _advance(self, to: float) -> None:
        seconds = to - self._now
        self._sums = [s + g * seconds for s, g in zip(self._sums, self._gauges, strict=True)]
        self._now = to

    def _close(self) -> None:
        preemptions, steps, seconds = self._before
        count = self.steps - steps
        self.rows.append(
            [
                *(total / self.interval for total in self._sums),
                self._preemptions - preemptions,
                (self.step_seconds - seconds) / count if count else 0.0,
            ]
        )
        self._sums = [0.0] * len(self.COLUMNS)
        self._before = (self._preemptions, self.steps, self.step_seconds)

    def mean(self, name: str, start: float = 0.0, end: float = math.inf) -> float:
        """Of a gauge over the whole intervals between two instants, or over all there is."""
        first, last = math.ceil(start / self.interval), len(self.rows)
        if end < math.inf:
            last = min(last, int(end / self.interval))
        column = self.COLUMNS.index(name)
        values = [row[column] for row in self.rows[first:last]]
        total = sum(values) * self.interval
        seconds = len(values) * self.interval
        if end == math.inf:  # and what is not a whole interval yet
            total += self._sums[column]
            seconds += self._now - len(self.rows) * self.interval
        return total / seconds if seconds > 0 else 0.0

    def columns(self) -> dict[str, list[float]]:
        """The series by name; `time` is the beginning of each interval."""
        names = (*self.COLUMNS, "evictions", "step_seconds")
        series: dict[str, list[float]] = {
            name: [row[i] for row in self.rows] for i, name in enumerate(names)
        }
        return {"time": [i * self.interval for i in range(len(self.rows))], **series}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of all does not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1] if ordered else math.nan


@dataclass(slots=True)
class SimulationReport:
    """The outcome. Rates are over `seconds`, from the first arrival to the last end."""

    records: list[Record]
    targets: Targets
    load: Load  # the scheduler's counters at the end
    timeline: Timeline

    @property
    def seconds(self) -> float:
        ends = [record.ended for record in self.records if record.ended is not None]
        return max(ends) - self.records[0].request.arrival if ends else 0.0

    @property
    def good(self) -> list[Record]:
        return [record for record in self.records if record.met(self.targets)]

    @property
    def attainment(self) -> float:
        """The share of all requests, refused ones among them, that met the targets."""
        return len(self.good) / len(self.records) if self.records else 0.0

    def summary(self) -> dict[str, Any]:
        """The whole as plain JSON: seconds, shares, and rates per second. None: no such value."""
        good, load = self.good, self.load
        seconds = self.seconds or math.inf
        finished = [record for record in self.records if record.reason in NATURAL]
        accepted = [record for record in self.records if not record.refused]
        ttft = [record.ttft for record in accepted]
        gaps = [r.gap for r in accepted if r.first_token is not None]
        evicted = sum(record.preemptions > 0 for record in accepted)
        fresh = load.prompt_tokens - load.prefix_hits + load.generated_tokens
        values: dict[str, float] = {
            "requests": len(self.records),
            "finished": len(finished),
            "refused": len(self.records) - len(accepted),
            "good": len(good),
            "attainment": self.attainment,
            "seconds": self.seconds,
            "goodput_requests": len(good) / seconds,
            "goodput_tokens": sum(record.output_tokens for record in good) / seconds,
            "throughput_requests": len(finished) / seconds,
            "throughput_tokens": load.generated_tokens / seconds,
            "ttft_p50": percentile(ttft, 0.5),
            "ttft_p99": percentile(ttft, 0.99),
            "mtpot_p50": percentile(gaps, 0.5),
            "mtpot_p99": percentile(gaps, 0.99),
            "utilisation": self.timeline.mean("used"),
            "running": self.timeline.mean("running"),
            "waiting": self.timeline.mean("waiting"),
            "steps": load.steps,
            "prefix_hit_share": load.prefix_hits / max(load.prefix_queries, 1),
            "evicted_share": evicted / max(len(accepted), 1),
            "evictions": load.preemptions,
            "recomputed_share": load.recomputed_tokens / max(load.recomputed_tokens + fresh, 1),
        }
        return {name: value if math.isfinite(value) else None for name, value in values.items()}
