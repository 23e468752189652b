"""The planner, where the answer is known: every step takes a second, whatever is in it."""

from __future__ import annotations

import pytest

from scheduler.admission import make_policy
from scheduler.capacity import (
    Configuration,
    Unattainable,
    allowed_misses,
    goodput_curve,
    idle_ttft,
    meets,
    plan_replicas,
    run_fleet,
    sustained_load,
)
from scheduler.outcome import Targets
from scheduler.profile import Profile, StepShape
from scheduler.request import SchedulerConfig
from scheduler.step_cost import StepCost
from scheduler.trace import TraceRequest

SECOND = Profile(points=((StepShape(1, 1, 0, 0), 1.0), (StepShape(1, 512, 0, 0), 1.0)))
PATIENT = Targets(ttft=3.6)  # two steps may be launched already, and its own is the third


def configuration(slots: int = 1, name: str = "small", **config) -> Configuration:
    return Configuration(
        name,
        SchedulerConfig(num_pages=400, max_num_seqs=slots, max_step_tokens=64, **config),
        lambda: StepCost.from_profile(SECOND),
        lambda truth: make_policy("oracle", truth=truth),
    )


def every(seconds: float, count: int = 200, output: int = 1) -> list[TraceRequest]:
    """Requests at equal distances. They end for length, which is foreseen: no step is wasted."""
    return [TraceRequest(i * seconds, 10, output, output) for i in range(count)]


@pytest.mark.parametrize(
    ("slots", "output", "expected"), [(1, 1, 1.0), (1, 4, 0.25), (4, 50, 4 / 51)]
)
def test_a_replica_sustains_what_its_slots_can_turn_over(slots, output, expected):
    """A request of n tokens keeps its slot for n steps, where there are several for one step more:
    the next was launched without it before its end was settled."""
    trace = every(1.0, 150, output)
    load = sustained_load(trace, configuration(slots), PATIENT, 1.0)
    assert load == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("rate", "slots", "replicas"), [(0.9, 1, 1), (3.5, 1, 4), (9.5, 1, 10)])
def test_replicas_divide_the_load(rate, slots, replicas):
    trace, targets = every(1 / rate, 400), Targets(ttft=1.6)
    plan = plan_replicas(trace, configuration(slots), targets, 1.0)
    assert plan.replicas == replicas
    assert plan.attainment == 1.0
    if replicas > 1:
        assert not meets(trace, configuration(slots), replicas - 1, targets, 1.0)


def test_requests_that_arrive_at_once_need_a_slot_each():
    trace = [TraceRequest(0.0, 10, 1, 1)] * 10
    at_once = Targets(ttft=1.6)
    assert plan_replicas(trace, configuration(), at_once, 1.0).replicas == 10
    assert plan_replicas(trace, configuration(), at_once, 0.7).replicas == 7
    assert plan_replicas(trace, configuration(5), at_once, 1.0).replicas == 2


def test_the_least_loaded_replica_is_asked():
    """Long and short in turn: going round, one replica gets all the long ones."""
    outputs = [1 if i % 2 else 5 for i in range(100)]
    trace = [TraceRequest(2.0 * i, 10, n, n) for i, n in enumerate(outputs)]
    targets = Targets(ttft=8.0)
    round_robin = run_fleet(trace, configuration(), 2, targets)
    least = run_fleet(trace, configuration(), 2, targets, least_load=True)
    assert round_robin.requests == least.requests == 100
    assert least.good == 100
    assert round_robin.good < 80


def test_the_curve_bends_where_capacity_ends():
    points = goodput_curve(every(1.0, 400), configuration(), PATIENT, [0.5, 1.0, 2.0])
    assert [point.load for point in points] == [0.5, 1.0, 2.0]
    assert points[0].goodput == pytest.approx(0.5, rel=0.02)
    assert points[1].goodput == pytest.approx(1.0, rel=0.02)
    assert points[2].attainment < 0.1  # nearly all wait for too long


@pytest.mark.parametrize(
    ("trace", "targets", "sentence"),
    [
        (
            every(1.0),
            Targets(ttft=0.5),
            "small: the first token of a prompt of 10 tokens takes 1 s",
        ),
        (
            [TraceRequest(0.0, 200, 1, 9)] * 3,
            Targets(ttft=3.5),
            "small: the first token of a prompt of 200 tokens takes 4 s on an idle replica, more "
            "than the TTFT target of 3.5 s",
        ),
        (
            every(1.0, output=2),
            Targets(mtpot=0.2),
            "small: one token after 12 others takes 1 s on an idle replica, more than the MTPOT "
            "target of 0.2 s",
        ),
        (
            [TraceRequest(0.0, 7000, 1, 9)] * 3,
            Targets(),
            "small: a prompt of 7000 tokens does not fit 6384 positions",
        ),
    ],
)
def test_impossible_targets_are_explained(trace, targets, sentence):
    with pytest.raises(Unattainable) as error:
        plan_replicas(trace, configuration(), targets, 0.99)
    assert str(error.value).startswith(sentence)


def test_what_few_requests_cannot_meet_is_no_obstacle_for_the_rest():
    trace = [*every(2.0, 99), TraceRequest(200.0, 250, 1, 1)]
    assert plan_replicas(trace, configuration(), PATIENT, 0.95).replicas == 1


def test_an_idle_replica_computes_a_prompt_in_chunks():
    cost, config = StepCost.from_profile(SECOND), configuration().config
    seconds = [idle_ttft(cost, config, n) for n in (1, 64, 65, 200)]
    assert seconds == pytest.approx([1.0, 1.0, 2.0, 4.0])


def test_allowed_misses():
    assert [allowed_misses(n, 0.99) for n in (99, 100, 200)] == [0, 1, 2]
    assert allowed_misses(1000, 1.0) == 0
