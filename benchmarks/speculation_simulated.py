"""Draft lengths in simulation: the serving scheduler, step times of a large GPU, known acceptance.

    python -m benchmarks.speculation_simulated

Every request's drafts are right with a chance of its own, the same for all policies, so the
controller can be held against an oracle that knows the chances, and against every fixed length.
Step times are a roofline model of Qwen3-8B on an H200, not a measurement (it stands in
benchmarks/scheduling_policies.py); a forward of the draft model is taken to cost 0.6 ms and 0.01 ms
a row, or nothing, as with drafters that only look things up. Counted are the tokens of a fixed time
in which somebody always waits.

The last rows are about working ahead on a device of its own, where a forward takes 1.2 ms: while
the target verifies, the draft model goes on for the likely outcomes. How many corrections it has
foreseen is an assumption.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.report import Row, json_line, rows_table, table
from benchmarks.scheduling_policies import H200_8B
from scheduler.acceptance import Acceptance, Curves
from scheduler.allocation import Option
from scheduler.controller import Controller
from scheduler.outcome import Targets
from scheduler.request import SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence as Running
from scheduler.simulate import simulate
from scheduler.simulated_drafts import DraftingCosts
from scheduler.speculation import DraftPolicy, FixedDrafts
from scheduler.step_cost import StepCost
from scheduler.trace import TraceRequest

MOST = 8
MODEL = DraftingCosts(forward=0.6e-3, token=0.01e-3)
FREE = DraftingCosts(forward=0.0)
# Of corrections, where the drafter works ahead: that the target's choice is the drafter's second
# one, which both draw with the same noise. Simulated pairs of distributions give 0.58 to 0.76.
FORESEEN = 0.65
CHANCES = {
    "0.2": (0.2,),
    "0.5": (0.5,),
    "0.7": (0.7,),
    "0.9": (0.9,),
    "mixed 0.95, 0.6, 0": (0.95, 0.6, 0.0),
}
STREAMS = (1, 4, 16, 64, 256)
TOKENS = 400

Make = Callable[[StepCost], DraftPolicy]


class Knowing(Acceptance):
    """Is told how probable each request's next draft is to be right, by its number."""

    def __init__(self, chances: Sequence[float]) -> None:
        super().__init__([(0,)], MOST)
        self._chances = chances

    def curves(self, sequences: Sequence[Running], number: int) -> Curves:
        chance = np.array(
            [self._chances[int(s.request.id) % len(self._chances)] for s in sequences]
        )
        return Curves(chance[:, None] ** np.arange(1, MOST + 1), np.ones(MOST))


def controller(computes: bool, knows: Sequence[float] | None = None, ahead: bool = False) -> Make:
    options = [Option((0,), computes)]
    if ahead:
        options.append(Option((0,), computes, ahead=True))

    def make(cost: StepCost) -> Controller:
        made = Controller(options, ["model"], MOST, cost)
        if knows is not None:
            made.acceptance = Knowing(knows)
        return made

    return make


def fixed(drafts: int) -> Make:
    return lambda cost: FixedDrafts(drafts)


def backlog(count: int, chances: Sequence[float]) -> list[TraceRequest]:
    """Requests that all wait from the start, in turn with each of these chances."""
    rng = np.random.default_rng(0)
    trace = []
    for i in range(count):
        hits = rng.random(TOKENS) < chances[i % len(chances)]
        right = "".join("1" if hit else "0" for hit in hits)
        trace.append(TraceRequest(0.0, 200, TOKENS, TOKENS, right=right))
    return trace


def rate(
    make: Make, trace: list[TraceRequest], streams: int, drafting: DraftingCosts, seconds: float
) -> float:
    """Tokens per second. Raises RuntimeError if there were no requests left to begin."""
    cost = StepCost.from_profile(H200_8B)
    config = SchedulerConfig(num_pages=60_000, max_num_seqs=streams, max_queued_requests=10**6)
    scheduler = Scheduler(config, make(cost), cost=cost)
    machine = StepCost.from_profile(H200_8B)
    simulate(trace, scheduler, machine, Targets(), drafting=drafting, horizon=seconds)
    load = scheduler.load()
    if not load.waiting:
        raise RuntimeError(f"{len(trace)} requests do not last {streams} streams {seconds:g} s")
    return load.generated_tokens / seconds


def lasting(plain: float, streams: int, seconds: float) -> int:
    """Requests enough for so many streams, though all drafts are right. plain: tokens per second
    without drafts."""
    return math.ceil((1 + MOST) * plain * seconds / TOKENS) + 2 * streams


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation_simulated",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer streams, shorter")
    args = parser.parse_args(argv)
    seconds = 4.0 if args.quick else 12.0
    lines, rows = [], []
    for kind, drafting in (("model", MODEL), ("free", FREE)):
        for name, chances in CHANCES.items():
            for streams in STREAMS[:: 2 if args.quick else 1]:
                few = backlog(12 * streams, chances)
                plain = rate(fixed(0), few, streams, drafting, seconds)
                trace = backlog(lasting(plain, streams, seconds), chances)

                def of(make: Make) -> float:
                    return rate(make, trace, streams, drafting, seconds)  # noqa: B023

                by_length = {k: of(fixed(k)) for k in (1, 2, 3, 4, 6, 8)} | {0: plain}
                best = max(by_length, key=lambda k: by_length[k])
                auto = of(controller(drafting is MODEL))
                oracle = of(controller(drafting is MODEL, chances))
                lines.append(
                    (
                        kind,
                        name,
                        str(streams),
                        f"{plain:.0f}",
                        f"{auto / plain:.2f}",
                        f"{best}: {by_length[best] / plain:.2f}",
                        f"{auto / by_length[best]:.3f}",
                        f"{auto / oracle:.3f}",
                    )
                )
                case = f"{kind}, {name}, {streams} streams"
                rows.append(Row(f"{case}: auto / plain", auto / plain, 0.98))
                rows.append(Row(f"{case}: auto / oracle", auto / oracle, 0.97))
                rows.append(Row(f"{case}: auto / best fixed", auto / by_length[best], 0.98))
                print(case, file=sys.stderr, flush=True)
    header = (
        "drafts",
        "right",
        "streams",
        "plain tok/s",
        "auto",
        "best",
        "over best",
        "over oracle",
    )
    print(table(header, lines) + "\n")
    rows += ahead(seconds)
    print(rows_table(rows))
    print(json_line("speculation_simulated", rows))
    return 0


def ahead(seconds: float) -> list[Row]:
    """A draft model on a device of its own, against the same one taking turns."""
    rows = []
    slow = DraftingCosts(forward=1.2e-3, token=0.01e-3)
    hidden = DraftingCosts(slow.forward, slow.token, ahead=True, foreseen=FORESEEN)
    for streams in (1, 2, 4):
        plain = rate(fixed(0), backlog(12 * streams, (0.8,)), streams, slow, seconds)
        trace = backlog(lasting(plain, streams, seconds), (0.8,))
        turns = rate(controller(True), trace, streams, slow, seconds)
        both = rate(controller(True, ahead=True), trace, streams, hidden, seconds)
        name = f"working ahead on a second device, {streams} streams, right 0.8"
        rows.append(Row(f"{name}: over taking turns", both / turns, 1.3))
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
