"""The plots of a load test's report, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.results import Answer, Results
from loadtest.scenario import Scenario


def draw(results: Results, scenario: Scenario, prefix: Path) -> list[Path]:
    """Writes `PREFIX_NAME.svg` for each plot that has data; returns the files."""
    mpl.rcParams["svg.hashsalt"] = scenario.name  # the same data gives the same file
    good = [answer for answer in results.answers if answer.error is None]
    out = []
    for name, plot in (
        ("throughput", throughput),
        ("ttft", first_token),
        ("inter_token", inter_token),
        ("whole", whole_answers),
    ):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        if good:
            plot(figure.subplots(), good, results, scenario)
        path = Path(f"{prefix}_{name}.svg")
        figure.savefig(path, metadata={"Date": None})
        out.append(path)
    return out


def throughput(axes: Axes, answers: list[Answer], results: Results, scenario: Scenario) -> None:
    """Output tokens per second, by the second each token arrived, and the users."""
    start = min(a.ended - a.total_ms / 1e3 for a in answers)
    arrivals = [second - start for answer in answers for second in token_times(answer)]
    seconds = max(int(max(arrivals, default=0)) + 1, 1)
    counts = [0] * seconds
    for at in arrivals:
        counts[min(int(at), seconds - 1)] += 1
    axes.step(range(seconds), counts, where="post", label="output events a second")
    axes.set(xlabel="seconds", ylabel="events with text / s", title="Throughput")
    axes.set_ylim(bottom=0)
    if results.history:
        users = axes.twinx()
        times = [second.at - start for second in results.history]
        users.plot(times, [second.users for second in results.history], "C1--", label="users")
        users.set_ylabel("users")
        users.set_ylim(bottom=0)
    axes.legend(loc="lower right")


def token_times(answer: Answer) -> list[float]:
    """When each event with text arrived, seconds since the epoch."""
    if answer.ttft_ms is None:
        return []
    out = [answer.ended + (answer.ttft_ms - answer.total_ms) / 1e3]
    for gap in answer.gaps_ms:
        out.append(out[-1] + gap / 1e3)
    return out


def first_token(axes: Axes, answers: list[Answer], results: Results, scenario: Scenario) -> None:
    """The share of requests whose first token came within so many milliseconds."""
    for kind in sorted({a.kind for a in answers}):
        values = [a.ttft_ms for a in answers if a.kind == kind and a.ttft_ms is not None]
        cumulative(axes, values, kind)
    axes.axvline(scenario.slo.ttft_ms, color="grey", linestyle=":", label="target")
    axes.set(xlabel="ms", ylabel="share of requests", title="Time to first token", xscale="log")
    axes.legend(loc="lower right")


def inter_token(axes: Axes, answers: list[Answer], results: Results, scenario: Scenario) -> None:
    """The share of gaps between tokens within so many milliseconds, over all gaps."""
    for kind in sorted({a.kind for a in answers}):
        gaps = [max(gap, 0.01) for a in answers if a.kind == kind for gap in a.gaps_ms]
        cumulative(axes, gaps, kind)
    axes.axvline(scenario.slo.inter_token_ms, color="grey", linestyle=":", label="target")
    axes.set(xlabel="ms", ylabel="share of gaps", title="Inter-token time", xscale="log")
    axes.legend(loc="lower right")


def whole_answers(axes: Axes, answers: list[Answer], results: Results, scenario: Scenario) -> None:
    """Each answer's time against its length."""
    for kind in sorted({a.kind for a in answers}):
        group = [a for a in answers if a.kind == kind]
        lengths, times = [a.output_tokens for a in group], [a.total_ms / 1e3 for a in group]
        axes.scatter(lengths, times, s=12, alpha=0.6, label=kind)
    axes.set(xlabel="output tokens", ylabel="seconds", title="Whole answers")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")


def cumulative(axes: Axes, values: Sequence[float], label: str) -> None:
    """An empirical distribution function, thinned to at most 500 steps."""
    ordered = sorted(values)
    if not ordered:
        return
    stride = max(1, len(ordered) // 500)
    points = [*range(0, len(ordered), stride), len(ordered) - 1]
    shares = [(i + 1) / len(ordered) for i in points]
    axes.step([ordered[i] for i in points], shares, where="post", label=label)
