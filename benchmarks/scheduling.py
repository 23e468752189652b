"""The scheduler measured: admission policies in simulation, single cases, its own cost.

    python -m benchmarks.scheduling                 everything that is simulated
    python -m benchmarks.scheduling --quick         on shorter traces, within five minutes
    python -m benchmarks.scheduling --server        and the real server, beside its simulation

Policies are compared on a model of Qwen3-8B on an H200 (`scheduling_policies.py`), whose steps get
dearer with the batch slowly, as a GPU's do: only there is memory worth filling. With `--profile`
they are compared on a measured machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.report import json_line, rows_table, table
from benchmarks.scheduling_cases import flood, long_prompt, planning_row, speed_row
from benchmarks.scheduling_policies import (
    SECONDS,
    SEEDS,
    SERVED,
    Outcome,
    compare,
    rows_of,
)
from scheduler.profile import Profile

SHOWN = ("oracle", "past-future", "aggressive 5.0%", "conservative")


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.scheduling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--quick", action="store_true", help="shorter, fewer traces, one of each")
    out.add_argument("--traces", nargs="+", choices=SECONDS, help="only these")
    out.add_argument("--profile", metavar="FILE", help="a measured machine instead of the model")
    out.add_argument("--kv-tokens", type=int, default=SERVED.kv_tokens, help="size of the pool")
    out.add_argument("--scale", type=float, default=SERVED.scale, help="of all lengths")
    out.add_argument("--server", action="store_true", help="measure the real server too")
    out.add_argument("--workers", type=int, default=2, help="simulations at a time")
    out.add_argument("--plot", metavar="DIR", help="draw the comparison here, as SVG")
    return out


def main() -> None:
    given = parser().parse_args()
    scenario = replace(SERVED, kv_tokens=given.kv_tokens, scale=given.scale)
    if given.profile:
        profile = Profile.parse(Path(given.profile).read_text())
        scenario = replace(scenario, profile=profile, max_step_tokens=256, max_num_seqs=256)
    lengths = {name: SECONDS[name] for name in given.traces or SECONDS}
    if given.quick:
        lengths = {name: length / 2 for name, length in lengths.items() if name in QUICK}
    rows = [planning_row(), speed_row(scenario, 60 if given.quick else 200)]
    rows += [*long_prompt(scenario, 0.02), flood(scenario)]
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        outcomes = compare(scenario, lengths, pool, 1 if given.quick else SEEDS)
    print(f"step times {scenario.profile.label}; pool of {scenario.kv_tokens:,} tokens")
    print(outcomes_table(outcomes), end="\n\n")
    for name, by_policy in outcomes.items():
        rows += rows_of(name, by_policy)
    if given.server:
        from benchmarks.scheduling_server import rows as server_rows

        rows += server_rows()
    if given.plot:
        draw(outcomes, Path(given.plot))
    print(rows_table(rows))
    print(json_line("scheduling", rows))


QUICK = ("chat", "decode-heavy", "bursts")


def outcomes_table(outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Every policy on every trace."""
    header = (
        "trace",
        "policy",
        "offered/s",
        "in time/s",
        "finished/s",
        "refused",
        "TTFT p99",
        "MTPOT p99",
        "pages used",
        "warm",
        "evicted",
        "recomputed",
    )
    lines = [
        (
            name,
            o.policy,
            f"{o.load:.2f}",
            f"{o.goodput:.2f}",
            f"{o.throughput:.2f}",
            f"{o.refused:.1%}",
            f"{o.ttft_p99:.2f}",
            f"{o.mtpot_p99:.2f}",
            f"{o.utilisation:.1%}",
            f"{o.warm_utilisation:.1%}",
            f"{o.evicted:.1%}",
            f"{o.recomputed:.1%}",
        )
        for name, by_policy in outcomes.items()
        for o in by_policy.values()
    ]
    return table(header, lines)


def draw(outcomes: Mapping[str, Mapping[str, Outcome]], folder: Path) -> None:
    """Goodput by policy, and memory over time where it matters most."""
    folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams["svg.hashsalt"] = "scheduling"  # the same data gives the same file
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / (len(SHOWN) + 1)
    for i, policy in enumerate((*SHOWN, "aggressive, best")):
        heights = [_goodput(by_policy, policy) for by_policy in outcomes.values()]
        axes.bar([x + i * width for x in range(len(heights))], heights, width, label=policy)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(outcomes))], list(outcomes))
    axes.set_ylabel("goodput, oracle = 1")
    axes.legend(ncols=len(SHOWN) + 1, fontsize="small", loc="lower center")
    figure.savefig(folder / "scheduling_goodput.svg", metadata={"Date": None})
    for name in outcomes.keys() & {"bursts", "shift", "reasoning"}:
        figure = Figure(figsize=(9, 6), layout="constrained")
        panels = figure.subplots(3, 1, sharex=True)
        for policy in SHOWN[1:]:
            series = outcomes[name][policy].series
            for axes, column in zip(panels, ("used", "running", "evictions"), strict=True):
                axes.plot(series["time"], series[column], label=policy, linewidth=1)
                axes.set_ylabel({"used": "pages in use, share"}.get(column, column))
        panels[0].legend(loc="lower right", fontsize="small")
        panels[0].set_title(f"{name}, offered at 1.2 times what the oracle sustains")
        panels[-1].set_xlabel("seconds")
        figure.savefig(folder / f"scheduling_{name}.svg", metadata={"Date": None})


def _goodput(by_policy: Mapping[str, Outcome], policy: str) -> float:
    swept = [o.goodput for name, o in by_policy.items() if name.startswith("aggressive")]
    value = max(swept) if policy == "aggressive, best" else by_policy[policy].goodput
    return value / by_policy["oracle"].goodput


if __name__ == "__main__":
    main()
