"""Find how many replicas of which configuration a load needs, by simulation."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cli.errors import CommandError
from cli.simulate import configuration_of, settle_collector
from cli.traces import (
    add_server_options,
    add_target_options,
    add_trace_options,
    read_profile,
    read_trace,
    scheduler_config,
    targets_of,
)
from scheduler.admission import POLICIES
from scheduler.capacity import (
    Configuration,
    LoadPoint,
    Plan,
    Unattainable,
    goodput_curve,
    plan_replicas,
)
from scheduler.profile import Profile
from scheduler.trace import mean_rate

# The curve's loads, as multiples of what one replica sustains.
CURVE = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="foresight plan",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_trace_options(out)
    add_target_options(out)
    add_server_options(out)
    out.add_argument("--attainment", type=float, default=0.99, help="share that meets the targets")
    out.add_argument(
        "--profile", metavar="FILE", nargs="+", required=True,
        help="made by foresight profile; each is a machine to choose from",
    )  # fmt: skip
    out.add_argument("--policy", choices=POLICIES, default="past-future", help="admission")
    out.add_argument("--max-num-seqs", type=int, nargs="+", default=[64, 256], help="to try")
    out.add_argument("--max-step-tokens", type=int, nargs="+", default=[2048], help="to try")
    out.add_argument(
        "--least-load", action="store_true",
        help="requests go to the replica with the fewest, not to each in turn",
    )  # fmt: skip
    out.add_argument("--json", action="store_true", help="print one JSON line instead of a table")
    out.add_argument("--plot", metavar="FILE", help="draw goodput against load here, as SVG")
    return out


def run(arguments: Sequence[str]) -> int:
    """Plans with every configuration; the one with the fewest replicas is the answer."""
    given = parser().parse_args(arguments)
    targets = targets_of(given)
    if not 0 < given.attainment <= 1:
        raise CommandError("--attainment must be above 0 and at most 1.")
    profiles = {path: read_profile(path) for path in given.profile}
    trace = read_trace(given)
    candidates = configurations(given, profiles)
    settle_collector()
    plans: list[Plan] = []
    failures: list[str] = []
    for configuration in candidates:
        try:
            plan = plan_replicas(
                trace, configuration, targets, given.attainment, least_load=given.least_load
            )
        except Unattainable as reason:
            failures.append(str(reason))
        else:
            plans.append(plan)
    if not plans:
        raise CommandError(f"no configuration meets the targets: {failures[0]}.")
    plans.sort(key=lambda plan: (plan.replicas, -plan.load))
    curves = {
        plan.configuration.name: goodput_curve(
            trace, plan.configuration, targets, [plan.load * x for x in CURVE]
        )
        for plan in plans
        if plan.load < math.inf
    }
    if given.plot is not None:
        draw(curves, Path(given.plot))
    if given.json:
        print(json.dumps(as_json(plans, failures, curves, mean_rate(trace))))
    else:
        show(plans, failures, mean_rate(trace))
    return 0


def configurations(given: argparse.Namespace, profiles: dict[str, Profile]) -> list[Configuration]:
    """Every combination of what may be chosen. A step holds a token of each sequence at least."""
    out: list[Configuration] = []
    for path, seqs, tokens in itertools.product(
        profiles, dict.fromkeys(given.max_num_seqs), dict.fromkeys(given.max_step_tokens)
    ):
        config = scheduler_config(given, max_num_seqs=seqs, max_step_tokens=max(tokens, seqs))
        name = f"{Path(path).stem}, {seqs} sequences, {config.max_step_tokens} tokens a step"
        out.append(configuration_of(name, given.policy, config, profiles[path], given))
    return out


def as_json(
    plans: list[Plan], failures: list[str], curves: dict[str, list[LoadPoint]], rate: float
) -> dict[str, object]:
    """All that was found, the best plan first."""
    return {
        "rate": rate if rate < math.inf else None,
        "plans": [
            {
                "configuration": plan.configuration.name,
                "max_num_seqs": plan.configuration.config.max_num_seqs,
                "max_step_tokens": plan.configuration.config.max_step_tokens,
                "replicas": plan.replicas,
                "load_per_replica": plan.load if plan.load < math.inf else None,
                "attainment": plan.attainment,
                "curve": [asdict(p) for p in curves.get(plan.configuration.name, ())],
            }
            for plan in plans
        ],
        "unattainable": failures,
    }


def show(plans: list[Plan], failures: list[str], rate: float) -> None:
    console = Console(highlight=False, markup=False)
    best = plans[0]
    table = Table("configuration", "replicas", "load of one, requests/s", "within targets")
    for column in table.columns[1:]:
        column.justify = "right"
    for plan in plans:
        table.add_row(
            plan.configuration.name,
            str(plan.replicas),
            f"{plan.load:.2f}",
            f"{plan.attainment:.2%}",
        )
    console.print(table)
    for failure in failures:
        console.print(f"Not possible: {failure}.")
    console.print(
        f"{rate:.2f} requests/s need {best.replicas} "
        f"replica{'s' if best.replicas > 1 else ''}: {best.configuration.name}."
    )


def draw(curves: dict[str, list[LoadPoint]], path: Path) -> None:
    try:
        from cli.plots import draw_curves
    except ImportError as error:
        raise CommandError("--plot needs matplotlib: pip install matplotlib.") from error
    draw_curves(curves, path)
