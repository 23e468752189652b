"""Chunks by a gap target: a long prompt must not stall running streams, nor wait without need."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from scheduler.gap import GapBudget
from scheduler.plan import Row
from scheduler.profile import Profile, StepShape, chunk_pairs
from scheduler.request import SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.speculation import FixedDrafts
from scheduler.step_cost import UNLIMITED, StepCost
from scheduler.wait import Waits
from tests.scheduler.clocked import Clocked
from tests.scheduler.driving import request

LONG = 8000

MOST = 10**6  # tokens: no limit but the target


def seconds(shape: StepShape) -> float:
    """A machine of about 20,000 prompt tokens a second: 10 ms a step, and attention."""
    return 0.010 + 50e-6 * shape.tokens + 2e-8 * shape.decode_context + 5e-9 * shape.chunk_pairs


def profiled() -> StepCost:
    shapes = [
        StepShape(rows, rows + chunk, 500 * rows, chunk_pairs(chunk, context))
        for rows in (1, 8, 32)
        for chunk in (0, 16, 64, 256, 1024, 2048)
        for context in (0, 4000, 8000)
        if chunk or not context
    ]
    return StepCost.from_profile(Profile(tuple((shape, seconds(shape)) for shape in shapes)))


def crowd(
    slower: float = 1.0,
    cost: StepCost | None = None,
    own: float | None = None,
    between: float = 0.0,
    **config,
):
    """Eight streams, and an 8k-token prompt that comes after a second."""
    scheduler = Scheduler(
        SchedulerConfig(num_pages=2000, max_num_seqs=16, max_model_len=9000, **config),
        cost=profiled() if cost is None else cost,
    )
    clocked = Clocked(scheduler, lambda shape: slower * seconds(shape), lambda took: between * took)
    items = [
        request(f"s{i}", range(i, i + 100), 700, arrival=0.0, mtpot_target=own if i == 3 else None)
        for i in range(8)
    ]
    clocked.run([*items, request("long", range(LONG), 10, arrival=1.0)])
    scheduler.check()
    return clocked


def gap(clocked: Clocked) -> float:
    return max(clocked.gap(f"s{i}", since=0.9) for i in range(8))


def test_without_a_target_a_long_prompt_takes_whole_steps() -> None:
    clocked = crowd()
    assert gap(clocked) > 0.1
    assert clocked.ttft("long") < 0.75


@pytest.mark.parametrize("target", [0.02, 0.03, 0.05])
def test_a_long_prompt_keeps_the_gaps_within_the_target(target: float) -> None:
    clocked = crowd(mtpot_target=target)
    assert gap(clocked) <= target
    # It takes no more steps than the target forces it to: each has all that is left beside what is
    # kept free for late ones, a third before any was seen.
    mixed = [took for plan, took in clocked.steps if plan.shape.chunk_pairs > plan.shape.tokens**2]
    assert len(mixed) > 4
    assert sorted(mixed)[1] > 0.9 * target / 1.5
    assert clocked.ttft("long") <= sum(mixed) + 4 * target


def test_the_strictest_of_the_streams_and_the_server_counts() -> None:
    own = gap(crowd(own=0.03))
    assert 0.02 < own <= 0.03
    assert gap(crowd(own=0.03, mtpot_target=0.06)) == own
    assert own < gap(crowd(own=0.06, mtpot_target=0.04)) <= 0.04


def test_a_target_below_the_step_itself_still_lets_the_prompt_advance() -> None:
    clocked = crowd(mtpot_target=0.001)
    assert clocked.ttft("long") > 3, "a page a step"
    assert gap(clocked) < 0.013, "which costs the streams next to nothing"


def test_a_slower_machine_than_the_profiles_is_noticed() -> None:
    assert gap(crowd(slower=1.6, mtpot_target=0.05)) <= 0.05


def test_what_passes_between_two_steps_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gap(crowd(between=0.8, mtpot_target=0.05)) <= 0.05
    # Negative control.
    monkeypatch.setattr(Waits, "longest_stretch", 1.0)
    assert gap(crowd(between=0.8, mtpot_target=0.05)) > 0.08


def test_steps_that_scatter_are_hardly_ever_late() -> None:
    """A machine on which others run too, and once it stops for long. The target is used as far as
    the slowest of the last steps let it be."""
    noise = np.random.default_rng(1)
    scheduler = Scheduler(
        SchedulerConfig(num_pages=40_000, max_num_seqs=16, max_model_len=60_000, mtpot_target=0.05),
        cost=profiled(),
    )
    taken = itertools.count()

    def scattered(shape: StepShape) -> float:
        pause = 10.0 if next(taken) == 250 else 1.0
        return seconds(shape) * pause * float(noise.lognormal(0, 0.15))

    clocked = Clocked(scheduler, scattered)
    streams = [request(f"s{i}", range(i, i + 100), 9000, arrival=0.0) for i in range(8)]
    long = [request(f"l{i}", range(i, LONG + i), 1, arrival=1.0 + 4 * i) for i in range(30)]
    clocked.run([*streams, *long], until=120.0)
    chunks = [took for plan, took in clocked.steps if plan.shape.chunk_pairs]
    late = chunks[len(chunks) // 2 :]
    assert len(late) > 300
    assert sum(took > 0.05 for took in late) <= 0.005 * len(late)
    assert np.median(late) > 0.05 / 1.15**4


def test_a_page_of_prompt_comes_before_drafts() -> None:
    """Where both together would be too late, nothing is drafted while the prompt is read."""
    target = 0.020  # a plain step takes 12 ms, and 15 with a page; with 20 drafts a row, 24

    def run(**config: float) -> Clocked:
        scheduler = Scheduler(
            SchedulerConfig(num_pages=2000, max_num_seqs=16, max_model_len=9000, **config),
            FixedDrafts(20),
            cost=profiled(),
        )
        clocked = Clocked(scheduler, seconds)
        streams = [request(f"s{i}", range(i, i + 100), 800, arrival=0.0) for i in range(8)]
        clocked.run([*streams, request("long", range(2000), 1, arrival=1.0)])
        return clocked

    def drafts(clocked: Clocked) -> set[bool]:
        """Whether there are any in steps that read the long prompt beside streams."""
        mixed = [p for p, _ in clocked.steps if p.shape.decode_context and any(map(chunk, p.rows))]
        return {any(row.drafts for row in plan.rows) for plan in mixed}

    assert drafts(run()) == {True}
    bound = run(mtpot_target=target)
    assert drafts(bound) == {False}
    read = [took for plan, took in bound.steps if plan.shape.decode_context and plan.rows[-1].chunk]
    assert max(read) <= target


def chunk(row: Row) -> bool:
    return row.chunk is not None


def test_without_a_profile_it_learns() -> None:
    clocked = crowd(cost=StepCost.learning(), mtpot_target=0.05)
    late = [took for plan, took in clocked.steps if plan.shape.chunk_pairs > 1_000_000]
    assert max(late, default=0.0) <= 0.06


def test_targets_of_nobody_change_nothing() -> None:
    plain, loose = crowd(), crowd(mtpot_target=100.0)
    assert [plan.shape for plan, _ in plain.steps] == [plan.shape for plan, _ in loose.steps]


def test_short_prompts_pass_the_long_one_within_the_target_too() -> None:
    scheduler = Scheduler(
        SchedulerConfig(num_pages=2000, max_num_seqs=16, max_model_len=9000, mtpot_target=0.04),
        cost=profiled(),
    )
    clocked = Clocked(scheduler, seconds)
    streams = [request(f"s{i}", range(i, i + 100), 400, arrival=0.0) for i in range(4)]
    short = [request(f"q{i}", range(50), 5, seed=i, arrival=1.1 + i / 20) for i in range(4)]
    clocked.run([*streams, request("long", range(LONG), 2, arrival=1.0), *short])
    assert max(clocked.gap(f"s{i}", since=0.9) for i in range(4)) <= 0.04
    assert max(clocked.ttft(f"q{i}") for i in range(4)) < 4 * 0.04
    assert clocked.ttft("long") > 0.4


def test_the_budget_of_a_step_adds_up() -> None:
    cost = profiled()
    budget = GapBudget(cost, 0.05, StepShape(8, 8, 800, 0), page_size=16)
    first = budget.room(0, MOST)
    assert 0 < first < UNLIMITED
    assert budget.room(4000, MOST) < first, "attention to what is before costs time"
    budget.add(first // 2, 0)
    assert first // 2 - 10 <= budget.room(0, MOST) < 0.55 * first, "two halves attend to less"
    budget.remove(first // 2, 0)
    assert budget.room(0, MOST) == first
    none = GapBudget(cost, 0.001, StepShape(8, 8, 800, 0), page_size=16)
    assert none.room(0, MOST) == 16
    none.add(10, 0)
    assert none.room(0, MOST) == 6
    none.add(6, 0)
    assert none.room(0, MOST) == 0


def test_first_tokens_are_predicted_by_the_chunks_that_a_gap_target_leaves() -> None:
    """With steps that may be much later than predicted, chunks are small."""
    noise = np.random.default_rng(2)
    scheduler = Scheduler(
        SchedulerConfig(num_pages=40_000, max_num_seqs=9, max_model_len=60_000, mtpot_target=0.05),
        cost=profiled(),
    )
    clocked = Clocked(scheduler, lambda shape: seconds(shape) * float(noise.lognormal(0, 0.15)))
    short = [request(f"a{i}", range(i, i + 40), 4, arrival=0.0) for i in range(40)]
    streams = [request(f"s{i}", range(i, i + 100), 3000, arrival=1.0) for i in range(8)]
    long = [request(f"l{i}", range(i, LONG + i), 1, arrival=3.0 + 6 * (i // 2)) for i in range(12)]
    clocked.run([*short, *streams, *long], until=45.0)
    waited = [clocked.ends[r.id, 0] for r in long[1::2]]  # for the slot of the one before
    off = [(e.first_token - e.arrival) / (e.predicted_first_token - e.arrival) for e in waited]
    assert all(0.9 < ratio < 1.35 for ratio in off), "the first of them, too"
