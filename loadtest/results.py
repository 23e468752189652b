"""What one load test left behind: per-request samples and locust's own CSV files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import percentile
from loadtest.scenario import Slo


@dataclass(frozen=True, slots=True)
class Answer:
    """One request. Times in milliseconds, `ended` in seconds since the epoch."""

    scenario: str
    kind: str
    ended: float
    total_ms: float
    ttft_ms: float | None
    gaps_ms: list[float]
    output_tokens: int
    prompt_tokens: int | None
    cached_tokens: int | None
    error: str | None

    def good(self, slo: Slo) -> bool:
        """Answered, and within both latency targets."""
        if self.error is not None or self.ttft_ms is None:
            return False
        typical = percentile(self.gaps_ms, 0.5) if self.gaps_ms else 0.0
        return self.ttft_ms <= slo.ttft_ms and typical <= slo.inter_token_ms


@dataclass(frozen=True, slots=True)
class Second:
    """One line of locust's history for all requests together."""

    at: float  # seconds since the epoch
    users: int
    failures_per_second: float


@dataclass(frozen=True, slots=True)
class Results:
    """One run."""

    answers: list[Answer]
    history: list[Second]
    failures: list[tuple[int, str]]  # how often, what


def read(prefix: Path) -> Results:
    """Reads `PREFIX_samples.jsonl` and what `locust --csv PREFIX --csv-full-history` wrote.

    Raises `FileNotFoundError` when the run left no samples.
    """
    lines = Path(f"{prefix}_samples.jsonl").read_text().splitlines()
    answers = [Answer(**json.loads(line)) for line in lines]
    history = [
        Second(float(row["Timestamp"]), int(row["User Count"]), float(row["Failures/s"]))
        for row in _rows(Path(f"{prefix}_stats_history.csv"))
        if row["Name"] == "Aggregated"
    ]
    failures = [
        (int(row["Occurrences"]), row["Error"]) for row in _rows(Path(f"{prefix}_failures.csv"))
    ]
    return Results(answers, history, failures)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one kind of request, or of all."""

    name: str
    requests: int
    errors: int
    output_tokens: int
    ttft_ms: tuple[float, float, float]  # p50, p90, p99
    gap_ms: tuple[float, float, float]
    total_ms: tuple[float, float, float]
    good: int  # within the scenario's latency targets


def summarise(name: str, answers: Sequence[Answer], slo: Slo) -> Summary:
    def points(values: Iterable[float]) -> tuple[float, float, float]:
        ordered = list(values)
        return percentile(ordered, 0.5), percentile(ordered, 0.9), percentile(ordered, 0.99)

    good = [answer for answer in answers if answer.error is None]
    return Summary(
        name=name,
        requests=len(answers),
        errors=len(answers) - len(good),
        output_tokens=sum(answer.output_tokens for answer in good),
        ttft_ms=points(answer.ttft_ms for answer in good if answer.ttft_ms is not None),
        gap_ms=points(gap for answer in good for gap in answer.gaps_ms),
        total_ms=points(answer.total_ms for answer in good),
        good=sum(answer.good(slo) for answer in answers),
    )


def duration(answers: Sequence[Answer]) -> float:
    """Seconds from the first request's start to the last answer's end."""
    if not answers:
        return 0.0
    return max(a.ended for a in answers) - min(a.ended - a.total_ms / 1e3 for a in answers)
