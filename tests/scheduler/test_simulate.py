"""The simulator, on cases small enough to work out by hand, and as a whole."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest

from scheduler.admission import POLICIES, make_policy
from scheduler.outcome import SimulationReport, Targets, Timeline, percentile
from scheduler.plan import StepPlan
from scheduler.profile import StepShape
from scheduler.request import Occupancy, SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.simulate import StuckError, simulate, true_lengths
from scheduler.trace import TraceRequest
from scheduler.workloads import WORKLOADS


class Cost:
    """A second a step, and a millisecond for every token beyond the rows' first."""

    def seconds(self, shape: StepShape) -> float:
        return 1.0 + 0.001 * (shape.tokens - shape.rows)

    def copy_seconds(self, pages: int) -> float:
        return 0.0


class Fast(Cost):
    def seconds(self, shape: StepShape) -> float:
        return 0.01 + 1e-5 * shape.tokens + 1e-8 * shape.decode_context


def run(
    trace: list[TraceRequest],
    *,
    policy: str = "aggressive",
    watermark: float = 0.0,
    cost: Cost | None = None,
    targets: Targets = Targets(),  # noqa: B008, it is frozen
    pages: int = 100,
    slots: int = 8,
    budget: int = 64,
    page_size: int = 4,
    queued: int = 2048,
    **how,
) -> SimulationReport:
    config = SchedulerConfig(
        num_pages=pages + 1,
        page_size=page_size,
        max_num_seqs=slots,
        max_step_tokens=budget,
        max_queued_requests=queued,
    )
    chosen = make_policy(policy, watermark=watermark, truth=true_lengths(trace))
    return simulate(trace, Scheduler(config, policy=chosen), cost or Cost(), targets, **how)


def test_a_lone_request():
    """Prompt of 11: a step of 1.010 s brings the first token, then one a second, the third of which
    ends it. The loop learns that one step later, but the end is when it was settled."""
    report = run([TraceRequest(5.0, 11, 4, 99)])
    (record,) = report.records
    assert record.admitted == 5.0
    assert record.first_token == pytest.approx(6.010)
    assert record.ended == pytest.approx(9.010)
    assert record.gap == pytest.approx(1.0)
    assert (record.reason, record.output_tokens) == ("stop", 4)
    assert report.seconds == pytest.approx(4.010)
    assert record.met(Targets(1.011, 1.001))
    assert not record.met(Targets(1.009, 1.001))
    assert not record.met(Targets(1.011, 0.999))


def test_a_request_that_fills_its_cap_ends_for_length():
    (record,) = run([TraceRequest(0.0, 3, 4, 4)]).records
    assert (record.reason, record.output_tokens) == ("length", 4)
    assert record.ended == pytest.approx(4.002)


def test_the_next_step_is_planned_while_one_runs():
    """The first request's steps run from 0, from 1.009 and from 2.009; a prompt that arrives while
    one of them runs goes into the next if that is not planned yet: it is when three tenths of the
    time are left."""
    for arrival, begins in ((1.1, 2.009), (1.7, 2.009), (1.72, 3.009), (2.7, 3.009), (2.72, 4.009)):
        trace = [TraceRequest(0.0, 10, 9, 99), TraceRequest(arrival, 5, 2, 99)]
        first, second = run(trace).records
        assert first.first_token == pytest.approx(1.009)
        assert second.admitted == pytest.approx(begins - 0.3, abs=0.01)
        assert second.first_token == pytest.approx(begins + 1.004)
        assert second.ended == pytest.approx(second.first_token + 1.0)
        assert first.gap == pytest.approx(1.004)  # the step in which it shared with the prompt


def test_an_idle_engine_starts_at_once():
    a, b = run([TraceRequest(0.0, 1, 1, 9), TraceRequest(10.25, 1, 1, 9)]).records
    assert (a.ended, b.admitted, b.ended) == (1.0, 10.25, 11.25)


def test_requests_that_arrive_together_are_planned_together():
    plans: list[StepPlan] = []
    run([TraceRequest(1.0, 4, 2, 9)] * 3, on_plan=lambda plan, _: plans.append(plan))
    assert len(plans[0].rows) == 3


def test_a_prefix_is_computed_once():
    """12 tokens of both prompts are equal: three pages of four. The second prompt's 20 - 12 tokens
    are computed in its first step."""
    trace = [TraceRequest(0.0, 20, 1, 9, "g", 12), TraceRequest(10.0, 20, 1, 9, "g", 12)]
    first, second = run(trace).records
    assert first.ttft == pytest.approx(1.019)
    assert second.ttft == pytest.approx(1.007)
    for other in (
        replace(trace[1], prefix_group="h"),
        replace(trace[1], tenant="t"),
        replace(trace[1], prefix_group=None, prefix_tokens=0),
    ):
        assert run([trace[0], other]).records[1].ttft == pytest.approx(1.019)


def test_an_answer_is_part_of_the_next_turn():
    """Prompt 8 and answer 10, an end token included, are 17 tokens; the keys of the first 16, four
    pages, are known to be computed, so the last four of the next turn's 20 are left."""
    trace = [TraceRequest(0.0, 8, 10, 99, "c", 8), TraceRequest(30.0, 20, 1, 9, "c", 20)]
    report = run(trace)
    assert report.records[1].ttft == pytest.approx(1.003)
    assert report.load.prefix_hits == 16


def test_a_preempted_request_pauses_and_still_ends_in_full():
    """Two requests grow to 40 tokens each in a pool of 60; the second gives way until the first
    has ended."""
    trace = [TraceRequest(0.0, 8, 32, 99), TraceRequest(0.0, 8, 32, 99)]
    report = run(trace, pages=15)
    first, second = report.records
    assert (first.preemptions, first.output_tokens) == (0, 32)
    assert (second.preemptions, second.output_tokens) == (1, 32)
    assert first.gap == pytest.approx(1.0)
    assert second.gap > 5
    summary = report.summary()
    assert summary["evicted_share"] == 0.5
    assert summary["evictions"] == report.load.preemptions == 1
    assert 0 < summary["recomputed_share"] < 1
    roomy = run(trace, pages=40).summary()
    assert roomy["evictions"] == roomy["recomputed_share"] == 0


def test_the_queue_refuses():
    trace = [TraceRequest(0.0, 4, 20, 99)] + [TraceRequest(1.5, 4, 20, 99)] * 3
    report = run(trace, slots=1, queued=1)
    assert [bool(record.refused) for record in report.records] == [False, False, True, True]
    assert report.summary()["refused"] == 2
    assert report.attainment == 0.5


def test_what_can_never_run_is_refused():
    report = run([TraceRequest(0.0, 400, 1, 9)])
    assert report.records[0].refused == "the prompt has 400 tokens, at most 399 fit"
    assert report.summary()["ttft_p99"] is None


def test_deadlines_end_requests():
    (record,) = run([TraceRequest(1.0, 1, 50, 99)], deadline=4.5).records
    assert record.reason == "timeout"
    assert record.ended == pytest.approx(5.7)  # at the plan after it has passed
    assert not record.met(Targets())


def test_an_impatient_caller_stops_early():
    trace = [TraceRequest(float(i), 1, 5, 9) for i in range(100)]
    targets = Targets(ttft=0.5)
    assert len(run(trace, targets=targets, most_misses=3).records) < 20
    assert len(run(trace, targets=targets, horizon=50.0).records) == 50


class Never:
    """Nobody may run."""

    def survey(self, running) -> None:
        pass

    def fits(self, sequence, hits, spare=0) -> bool:
        return False


def test_a_scheduler_that_never_runs_anybody_is_an_error(monkeypatch):
    scheduler = Scheduler(SchedulerConfig(num_pages=10))
    monkeypatch.setattr(scheduler._decider, "_admission", Never())
    with pytest.raises(StuckError, match="1 requests wait"):
        simulate([TraceRequest(0.0, 1, 1, 1)], scheduler, Cost(), Targets())


@pytest.mark.parametrize("policy", [*POLICIES, "oracle"])
@pytest.mark.parametrize("workload", ["chat", "multi-turn", "bursts"])
def test_every_request_ends_once_and_decisions_repeat(workload, policy):
    """Under pressure: the pool holds a fraction of what arrives."""
    trace = WORKLOADS[workload].make(np.random.default_rng(3), 20.0, 80, 0.1)

    def once() -> tuple[SimulationReport, str]:
        seen = hashlib.sha256()
        report = run(
            trace,
            policy=policy,
            cost=Fast(),
            pages=200,
            slots=32,
            on_plan=lambda plan, _: seen.update(repr(plan).encode()),
        )
        return report, seen.hexdigest()

    report, plans = once()
    assert [record.request for record in report.records] == trace
    for record in report.records:
        request = record.request
        assert record.reason == (
            "length" if request.output_tokens == request.max_tokens else "stop"
        )
        assert record.output_tokens == request.output_tokens
        assert request.arrival <= record.admitted < record.first_token <= record.ended
    load = report.load
    assert load.generated_tokens == sum(request.output_tokens for request in trace)
    assert load.running == load.waiting == load.pages_held == 0
    assert 0 < report.timeline.mean("used") <= 1
    again, same_plans = once()
    assert plans == same_plans
    assert again.summary() == report.summary()


def test_the_oracle_evicts_nobody():
    trace = WORKLOADS["decode-heavy"].make(np.random.default_rng(0), 5.0, 60, 0.02)
    tight = {"cost": Fast(), "pages": 60, "slots": 32}
    assert run(trace, policy="oracle", **tight).summary()["evictions"] == 0
    assert run(trace, policy="aggressive", **tight).summary()["evictions"] > 0


def found(held: int, running: int, preemptions: int = 0) -> Occupancy:
    return Occupancy(held / 10, running, 0, 0.1, preemptions)


def test_the_timeline_weighs_by_time():
    timeline = Timeline(2.0)
    timeline.note(1.0, found(5, 1))
    timeline.note(1.5, found(10, 2, 3))
    timeline.note(5.0, found(0, 0, 4))
    columns = timeline.columns()
    assert columns["time"] == [0.0, 2.0]
    assert columns["used"] == pytest.approx([(0.5 * 0.5 + 0.5 * 1.0) / 2, 1.0])
    assert columns["running"] == pytest.approx([(0.5 + 1.0) / 2, 2.0])
    assert columns["evictions"] == [3, 0]
    assert columns["reserve"] == pytest.approx([0.05, 0.1])
    assert timeline.mean("used") == pytest.approx((0.25 + 3.5) / 5)
    assert timeline.mean("used", 2.0, 4.0) == 1.0


def test_percentiles_are_values_that_occurred():
    values = [float(i) for i in range(100)]
    assert percentile(values, 0.5) == 49.0
    assert percentile(values, 0.99) == 98.0
    assert percentile([1.0, math.inf], 0.99) == math.inf
    assert math.isnan(percentile([], 0.5))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_targets_are_positive(bad):
    with pytest.raises(ValueError, match="ttft target must be a positive number"):
        Targets(ttft=bad)
