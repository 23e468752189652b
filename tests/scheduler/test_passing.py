"""When a newcomer's step is without the rows of a flood. On a simulated clock."""

from __future__ import annotations

from itertools import pairwise

from scheduler.passing import GAIN
from scheduler.plan import StepPlan
from scheduler.profile import Profile, StepShape, chunk_pairs
from scheduler.request import SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.step_cost import StepCost
from tests.scheduler.clocked import Clocked
from tests.scheduler.test_flood import some

SECONDS = 15.0
FIXED, ROW = 1.5e-3, 0.3e-3  # seconds of a step, and of each of its tokens: much as on a CPU


def seconds(shape: StepShape) -> float:
    return FIXED + ROW * shape.tokens


def free_rows(shape: StepShape) -> float:
    """More as on a GPU."""
    return 0.010 + 1e-6 * shape.tokens


MODEST = some("modest", 100, 8.0, 20, prompts=(16, 40))
FLOOD = some("flood", 1500, 0.0, 40, prompts=(16, 40))


def run(passes: bool, takes=seconds, mtpot_target: float | None = None) -> Clocked:
    shapes = [
        StepShape(rows, rows + chunk, 100 * rows, chunk_pairs(chunk, 0))
        for rows in (1, 4, 8, 16, 32)
        for chunk in (0, 16, 64, 256)
    ]
    cost = StepCost.from_profile(Profile(tuple((shape, takes(shape)) for shape in shapes)))
    config = SchedulerConfig(
        num_pages=6000,
        max_num_seqs=32,
        max_model_len=9000,
        max_queued_requests=10**5,
        max_step_tokens=256,
        mtpot_target=mtpot_target,
    )
    scheduler = Scheduler(config, cost=cost)
    if not passes:
        scheduler._decider._passing.stay = lambda rows, work, *_: (rows, work)
    clocked = Clocked(scheduler, takes)
    clocked.run([*MODEST, *FLOOD], until=SECONDS)
    scheduler.check()
    return clocked


def quantile(clocked: Clocked, share: float) -> float:
    times = sorted(clocked.ttft(r.id) for r in MODEST if clocked.times[r.id, 0])
    assert len(times) > 90
    return times[int(share * len(times))]


def tokens(clocked: Clocked) -> int:
    return sum(len(times) for times in clocked.times.values())


def plans(clocked: Clocked) -> list[StepPlan]:
    return [plan for plan, _ in clocked.steps]


def test_newcomers_wait_for_less_at_hardly_any_cost() -> None:
    without, passes = run(False), run(True)
    assert quantile(passes, 0.5) < 0.9 * quantile(without, 0.5)
    assert quantile(passes, 0.95) < 0.9 * quantile(without, 0.95)
    assert tokens(passes) > 0.98 * tokens(without)


def gaps(clocked: Clocked) -> list[float]:
    """Between the tokens of each stream of the flood."""
    return [
        b - a
        for (name, _), times in clocked.times.items()
        if "flood" in name
        for a, b in pairwise(times)
    ]


def test_nobody_is_left_out_twice_in_a_row() -> None:
    """A stream's gap is that of a step with all rows and one that is shorter, at most."""
    found, longest = gaps(run(True)), FIXED + 256 * ROW
    assert max(found) <= (1 + GAIN) * longest
    assert sum(gap > FIXED + 40 * ROW for gap in found) > 100, "some are"


def test_nobody_is_left_out_beyond_the_gap_target() -> None:
    target, page = 20e-3, 16 * ROW  # a page of a prompt is read however long that takes
    assert max(gaps(run(True, mtpot_target=target))) <= target + page
    assert sum(gap > target + page for gap in gaps(run(True))) > 50
    within = plans(run(True, mtpot_target=target))
    assert within != plans(run(False, mtpot_target=target)), "there is room for some"


def test_nobody_is_left_out_where_rows_are_free() -> None:
    assert plans(run(True, free_rows)) == plans(run(False, free_rows))
