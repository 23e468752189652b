"""Measure what steps cost on this machine, for the scheduler and the simulator.

    foresight profile --model FOLDER --output FILE

takes the options of `foresight serve`, builds the worker as it would and runs steps on it: decodes
of many rows and contexts, prompt chunks, both together, and copies of KV pages. The result is a
JSON file for `foresight serve --profile FILE`.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import platform
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cli.config import resolve
from cli.errors import CommandError
from cli.output import write_output
from engine.errors import StartupError
from scheduler.profile import Profile, StepShape
from scheduler.request import SchedulerConfig
from scheduler.step_cost import StepCost

if TYPE_CHECKING:
    from worker.measure import Bench, StepLoad

ROUNDS = 9
CONTEXTS = (32, 512, 2048, 7168)  # positions
COPIES = (1, 4, 16, 64, 256)  # pages
HELD_OUT = 30  # steps of random shapes that the fit does not see

Point = tuple[StepShape, float]


def run(arguments: Sequence[str]) -> int:
    """Measures, prints the table and writes the file."""
    given, rest = parser().parse_known_args(arguments)
    config = resolve(rest, os.environ)
    logging.getLogger("engine").setLevel(logging.WARNING)
    from engine.build import build_worker  # torch
    from worker.measure import Bench

    console = Console(highlight=False)
    console.print(f"loading {config.engine.model.model}")
    try:
        worker, limits = build_worker(config.engine, lambda phase: None, patient=True)
    except StartupError as error:
        raise CommandError(str(error)) from error
    try:
        bench = Bench(worker, limits)
        points, held, copies = measure(bench, limits, given.seconds)
        profile = Profile(
            points=tuple(points),
            copies=tuple(copies),
            page_size=limits.page_size,
            page_bytes=sum(layer[0].nbytes for layer in worker.kv),
            machine=machine(),
            device=worker.facts.device,
            model=Path(config.engine.model.model).name,
            dtype=worker.facts.dtype,
            date=datetime.now(UTC).date().isoformat(),
        )
    finally:
        worker.close()
    show(console, profile, held)
    write_output(given.output, profile.dump(), console)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's own flags; all others are those of `foresight serve`."""
    made = argparse.ArgumentParser(
        prog="foresight profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All options of foresight serve are taken too.",
        allow_abbrev=False,
    )
    made.add_argument("--output", metavar="FILE", required=True, help="where the profile goes")
    made.add_argument(
        "--seconds", type=float, default=90.0, help="time to measure for (%(default)s)"
    )
    return made


def measure(
    bench: Bench, limits: SchedulerConfig, seconds: float
) -> tuple[list[Point], list[Point], list[tuple[int, float]]]:
    """Points of the grid, points of random loads, seconds of copies: each the median of its runs.

    The first round runs everything once, cheap steps first, and leaves out what half of the time is
    not enough for. Later rounds run in orders of their own, so that a slow moment of the machine
    does not fall on one point alone; a load takes part until it has had its share of the time.
    """
    grid = [load for load in loads(limits) if bench.fits(load)]
    held = [load for load in random_loads(limits) if bench.fits(load) and load not in grid]
    pages = [count for count in COPIES if count < limits.num_pages]
    order = sorted(dict.fromkeys([*grid, *held[:HELD_OUT]]), key=_size)
    found: dict[StepLoad, list[list[Point]]] = {}
    spent: dict[StepLoad, float] = {}
    copies: dict[int, list[float]] = defaultdict(list)
    shuffled = random.Random(1)
    share = seconds / len(order) / 2  # a load runs once more as long as it has had less than this
    started = time.monotonic()
    bench.measure(order[0])  # warms up
    with Progress(transient=True) as bar:
        task = bar.add_task("measuring", total=seconds)
        for round_ in range(ROUNDS):
            until = started + (seconds if round_ else seconds / 2)
            for load in order:
                before = time.monotonic()
                used = spent.get(load, 0.0)
                if before > until or used > share:
                    continue
                found.setdefault(load, []).append(bench.measure(load))
                spent[load] = used + time.monotonic() - before
                bar.update(task, completed=time.monotonic() - started)
            for count in pages:
                copies[count].append(bench.copy(count))
            order = list(found)
            shuffled.shuffle(order)
    return (
        [middle(found[load]) for load in grid if load in found],
        [middle(found[load]) for load in held if load in found],
        [(count, median(times)) for count, times in copies.items()],
    )


def middle(rounds: Sequence[Sequence[Point]]) -> Point:
    """The shape in the middle of the steps of a load, and the median of all its seconds."""
    shape = rounds[0][len(rounds[0]) // 2][0]
    return shape, median(seconds for points in rounds for _, seconds in points)


def loads(limits: SchedulerConfig) -> list[StepLoad]:
    """The grid: decodes, chunks, and both in one step. Some will not fit; see `Bench.fits`."""
    from worker.measure import StepLoad

    rows = _doublings(1, limits.max_num_seqs)
    tokens = _doublings(8, limits.max_step_tokens)
    decodes = [StepLoad(r, c) for r in rows for c in CONTEXTS]
    chunks = [StepLoad(0, 0, t, c) for t in tokens for c in (0, *CONTEXTS[1:])]
    mixed = [
        StepLoad(r, 512, t, c)
        for r in rows[1::2]
        for t in (*tokens[2::2], limits.max_step_tokens - r)
        for c in (0, 2048)
    ]
    return decodes + chunks + mixed


def random_loads(limits: SchedulerConfig) -> list[StepLoad]:
    """Shapes between and beyond those of the grid."""
    from worker.measure import StepLoad

    rng = random.Random(2)

    def up_to(most: int) -> int:
        return round(most ** rng.random())

    made = []
    for i in range(4 * HELD_OUT):
        rows = up_to(limits.max_num_seqs - 1)
        chunk = up_to(limits.max_step_tokens) if i % 3 else 0
        context = up_to(limits.max_model_len)
        made.append(StepLoad(rows if i % 3 < 2 else 0, context, chunk, up_to(4096)))
    return made


def _size(load: StepLoad) -> int:
    """Grows with the time a load takes, roughly."""
    return load.rows * (1000 + load.context) + load.chunk * (1000 + load.chunk_context)


def _doublings(first: int, last: int) -> list[int]:
    """first, 2 · first, … and last."""
    found = []
    while first < last:
        found.append(first)
        first *= 2
    return [*found, last]


def show(console: Console, profile: Profile, held: Sequence[Point]) -> None:
    """The points with what the fitted model says of each, and how good it is."""
    cost = StepCost.from_profile(profile)
    table = Table("rows", "tokens", "decode context", "chunk pairs", "ms", "model ms", box=None)
    for column in table.columns:
        column.justify = "right"
    for shape, seconds in profile.points:
        counts = (shape.rows, shape.tokens, shape.decode_context, shape.chunk_pairs)
        times = (seconds * 1e3, cost.seconds(shape) * 1e3)
        table.add_row(*(f"{n:,}" for n in counts), *(f"{ms:.2f}" for ms in times))
    console.print(table)
    for pages, seconds in profile.copies:
        console.print(
            f"copy of {pages:>4} pages of {profile.page_bytes:,} B: {seconds * 1e3:.3f} ms"
        )
    for name, points in (("the fit's own steps", profile.points), ("steps held out", held)):
        errors = sorted(abs(cost.seconds(shape) / seconds - 1) for shape, seconds in points)
        if errors:
            console.print(
                f"relative error on {len(errors)} of {name}: median {median(errors):.1%}, "
                f"95th percentile {errors[math.ceil(0.95 * len(errors)) - 1]:.1%}"
            )
    console.print(profile.label, soft_wrap=True)


def machine() -> str:
    """The processor in words, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as facts:
            names = [line.partition(":")[2].strip() for line in facts if "model name" in line]
        name = names[0] if names else name
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
