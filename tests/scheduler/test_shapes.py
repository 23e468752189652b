"""The shape a plan carries is what its rows will read, counted one position at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.plan import Row, RowResult, StepPlan, StepResult
from scheduler.profile import StepShape
from scheduler.rows import shape_as_run
from tests.scheduler.driving import Pair, pair, request
from tests.scheduler.test_invariance import workload


def counted(both: Pair, plan: StepPlan) -> tuple[int, int, int, int, int, int]:
    """Rows, tokens, positions read by live rows as far as is settled, pairs of chunks; live rows,
    and their drafts."""
    by_slot = {sequence.slot: sequence for sequence in both.scheduler._running}
    tokens = context = pairs = live = drafts = 0
    for row in plan.rows:
        sequence = by_slot[row.slot]
        if row.chunk is None:
            live, drafts = live + 1, drafts + row.drafts
            tokens += 1 + row.drafts
            context += len(sequence.tokens)
        else:
            tokens += len(row.chunk)
            first = sequence.fed - len(row.chunk)
            pairs += sum(position + 1 for position in range(first, sequence.fed))
    return len(plan.rows), tokens, context, pairs, live, drafts


@pytest.mark.parametrize(("depth", "drafts"), [(0, 0), (1, 0), (1, 3)])
def test_shapes_of_plans(depth: int, drafts: int) -> None:
    both = pair(num_pages=60, depth=depth, drafts=drafts, budget=24)
    plan_only = both.scheduler.plan
    seen = []

    def plan(now: float) -> StepPlan | None:
        made = plan_only(now)
        if made is not None:
            seen.append((made.shape, counted(both, made)))
        return made

    both.scheduler.plan = plan  # type: ignore[method-assign]
    both.add(*workload(24, 1))
    both.finish()
    assert len(seen) > 40
    assert any(shape.decode_context and shape.chunk_pairs for shape, _ in seen)
    for shape, (rows, tokens, context, pairs, live, drafted) in seen:
        pairs += drafted * shape.decode_context // max(live, 1)  # each reads what its row reads
        assert (shape.rows, shape.tokens, shape.chunk_pairs) == (rows, tokens, pairs)
        assert context <= shape.decode_context <= context + rows * depth * (1 + drafts)


def test_drafts_that_were_not_made_are_taken_off_the_shape() -> None:
    """None made: the shape is that of the step without; all made: that of the plan."""
    rows = tuple(Row(i, 1, None, True, k, (0,)) for i, k in enumerate((3, 0, 4)))
    without = StepShape(4, 53, 900, 5000)
    plan = StepPlan(0, (), (*rows, Row(3, 1, (7,) * 50, False)), shape=without.with_drafts(7, 3))
    assert (plan.shape.tokens, plan.shape.chunk_pairs) == (60, 5000 + 7 * 300)
    for made, shape in ((0, without), (1, plan.shape)):
        results = tuple(RowResult(proposed=made * row.drafts) for row in plan.rows)
        assert shape_as_run(plan, StepResult(0, results)) == shape


def test_rows_that_were_not_run_are_taken_off_the_shape() -> None:
    rows = tuple(Row(i, 1, None, True, k, (0,)) for i, k in enumerate((3, 0, 4)))
    shape = StepShape(4, 53, 900, 5000).with_drafts(7, 3)
    plan = StepPlan(0, (), (*rows, Row(3, 1, (7,) * 50, False)), shape=shape)
    done = RowResult((1,) * 4, proposed=3), RowResult(), RowResult(), RowResult()
    result = StepResult(0, done, over=2)
    assert shape_as_run(plan, result) == StepShape(2, 54, 300, 5900)


def test_the_cost_learns_from_settled_steps() -> None:
    both = pair()
    both.add(*workload(4, 1))
    assert not both.scheduler.cost.ready
    plan = both.scheduler.plan(0.0)
    assert plan is not None
    result = replace(both.worker.launch(plan).wait(), seconds=0.25)
    both.scheduler.settle(plan, result, 0.0)
    assert both.scheduler.cost.seconds(plan.shape) == pytest.approx(0.25)


@pytest.mark.parametrize("cached", [True, False])
def test_drafters_are_told_who_may_learn_of_whom(cached: bool) -> None:
    """Tenants and salts keep apart, with a prefix cache and without."""
    both = pair(enable_prefix_cache=cached)
    callers = [("a", b""), ("a", b""), ("b", b""), ("a", b"salt")]
    for i, (tenant, salt) in enumerate(callers):
        both.add(request(f"r{i}", range(i, i + 9), 5, tenant=tenant, cache_salt=salt))
    plan = both.scheduler.plan(0.0)
    assert plan is not None
    groups = {admit.epoch: admit.group for admit in plan.admits}
    assert len(groups) == 4
    assert len(set(groups.values())) == 3
