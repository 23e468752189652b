"""Run a trace through the scheduler in virtual time and say what would have come of it."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cli.errors import CommandError
from cli.traces import (
    add_server_options,
    add_target_options,
    add_trace_options,
    read_profile,
    read_trace,
    scheduler_config,
    targets_of,
)
from scheduler.admission import POLICIES, make_policy
from scheduler.capacity import Configuration, idle_obstacle
from scheduler.outcome import SimulationReport
from scheduler.step_cost import StepCost

# What the table shows: a label, the key of the summary, and how to print it.
_ROWS = (
    ("requests", "requests", "{:.0f}"),
    ("refused", "refused", "{:.0f}"),
    ("within targets", "attainment", "{:.1%}"),
    ("goodput, requests/s", "goodput_requests", "{:.2f}"),
    ("goodput, tokens/s", "goodput_tokens", "{:.0f}"),
    ("throughput, requests/s", "throughput_requests", "{:.2f}"),
    ("throughput, tokens/s", "throughput_tokens", "{:.0f}"),
    ("TTFT p50, s", "ttft_p50", "{:.3f}"),
    ("TTFT p99, s", "ttft_p99", "{:.3f}"),
    ("MTPOT p50, s", "mtpot_p50", "{:.3f}"),
    ("MTPOT p99, s", "mtpot_p99", "{:.3f}"),
    ("pages in use", "utilisation", "{:.1%}"),
    ("running", "running", "{:.1f}"),
    ("waiting", "waiting", "{:.1f}"),
    ("requests evicted", "evicted_share", "{:.2%}"),
    ("tokens recomputed", "recomputed_share", "{:.2%}"),
    ("prompt tokens cached", "prefix_hit_share", "{:.1%}"),
    ("simulated seconds", "seconds", "{:.1f}"),
    ("real seconds", "real_seconds", "{:.1f}"),
)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="foresight simulate",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_trace_options(out)
    add_target_options(out)
    add_server_options(out)
    out.add_argument("--profile", metavar="FILE", required=True, help="made by foresight profile")
    out.add_argument(
        "--policy", nargs="+", choices=(*POLICIES, "oracle"), default=["past-future"],
        help="admission; several are compared",
    )  # fmt: skip
    out.add_argument("--max-num-seqs", type=int, default=256, help="sequences that run at once")
    out.add_argument("--max-step-tokens", type=int, default=2048, help="tokens of one step")
    out.add_argument("--deadline", type=float, help="ends requests so many seconds after arrival")
    out.add_argument("--json", action="store_true", help="print one JSON line instead of a table")
    out.add_argument("--plot", metavar="DIR", help="draw plots over time here, as SVG")
    return out


def run(arguments: Sequence[str]) -> int:
    """Simulates once per policy and prints them side by side."""
    given = parser().parse_args(arguments)
    targets = targets_of(given)
    profile = read_profile(given.profile)
    trace = read_trace(given)
    if given.deadline is not None and not given.deadline > 0:
        raise CommandError("--deadline must be a positive number of seconds.")
    config = scheduler_config(
        given, max_num_seqs=given.max_num_seqs, max_step_tokens=given.max_step_tokens
    )
    settle_collector()
    reports: dict[str, SimulationReport] = {}
    summaries: dict[str, dict[str, Any]] = {}
    for policy in dict.fromkeys(given.policy):
        configuration = configuration_of(policy, policy, config, profile, given)
        # Targets that not one request can meet are a mistake; the shortest is the easiest.
        obstacle = idle_obstacle(trace, configuration, targets, 0.0)
        if obstacle:
            raise CommandError(f"no request of the trace can meet the targets: {obstacle}.")
        started = time.perf_counter()
        engine = configuration.engine(trace, targets, deadline=given.deadline)
        reports[policy] = engine.play(trace)
        real = time.perf_counter() - started
        summaries[policy] = {**reports[policy].summary(), "real_seconds": real}
    if given.plot is not None:
        draw(reports, Path(given.plot))
    if given.json:
        print(json.dumps({"profile": profile.label, "policies": summaries}))
    else:
        show(profile.label, summaries)
    return 0


def configuration_of(
    name: str, policy: str, config: Any, profile: Any, given: argparse.Namespace
) -> Configuration:
    """A replica with that policy. Raises `CommandError`."""
    try:
        make_policy(policy, watermark=given.watermark, truth={})
    except ValueError as error:
        raise CommandError(f"{error}.") from error
    return Configuration(
        name,
        config,
        lambda: StepCost.from_profile(profile),
        lambda truth: make_policy(policy, watermark=given.watermark, seed=given.seed, truth=truth),
    )


def settle_collector() -> None:
    """What is loaded stays; and a simulation makes many short-lived values, but no cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)


def draw(reports: dict[str, SimulationReport], folder: Path) -> None:
    try:
        from cli.plots import draw_timelines
    except ImportError as error:
        raise CommandError("--plot needs matplotlib: pip install matplotlib.") from error
    for path in draw_timelines({name: r.timeline for name, r in reports.items()}, folder):
        print(f"wrote {path}")


def show(label: str, summaries: dict[str, dict[str, Any]]) -> None:
    table = Table("", *summaries, title=f"Step costs {label}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for title, key, form in _ROWS:
        values = (summary[key] for summary in summaries.values())
        table.add_row(title, *("–" if value is None else form.format(value) for value in values))
    Console(highlight=False, markup=False).print(table)
