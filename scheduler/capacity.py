"""How many replicas does a trace need? Answered by simulating them: see `foresight plan`.

Whether a configuration meets its targets falls with the load, and rises with the number of
replicas. So the load one replica sustains, and then the number of replicas, are found by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from scheduler.admission import Policy
from scheduler.outcome import SimulationReport, Targets, percentile
from scheduler.profile import StepShape, chunk_pairs
from scheduler.request import SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.simulate import SimulatedEngine, true_lengths
from scheduler.step_cost import StepCost
from scheduler.trace import TraceRequest, at_rate, mean_rate

# Of the load a replica sustains: bisection ends when its bounds are nearer than this, as a ratio.
PRECISION = 1.03
_STEPS = 12  # doublings or halvings from the rate of the trace, before a search is given up

Trace = Sequence[TraceRequest]


class Unattainable(Exception):  # noqa: N818, a fact about the targets
    """No number of replicas meets the targets. The message says why, in one sentence."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to run a replica: limits, what steps cost there, and the admission policy."""

    name: str
    config: SchedulerConfig
    make_cost: Callable[[], StepCost]  # each scheduler corrects its own
    make_policy: Callable[[Mapping[str, int]], Policy]  # given true lengths, for an oracle

    def engine(
        self, trace: Trace, targets: Targets, *, deadline: float | None = None
    ) -> SimulatedEngine:
        """An idle replica for (a part of) a trace."""
        policy = self.make_policy(true_lengths(trace))
        scheduler = Scheduler(self.config, policy=policy, cost=self.make_cost())
        return SimulatedEngine(scheduler, self.make_cost(), targets, deadline=deadline)


@dataclass(frozen=True, slots=True)
class Fleet:
    """What several replicas made of a trace together."""

    reports: list[SimulationReport]

    @property
    def requests(self) -> int:
        return sum(len(report.records) for report in self.reports)

    @property
    def good(self) -> int:
        return sum(len(report.good) for report in self.reports)

    @property
    def seconds(self) -> float:
        """From the first arrival to the last end."""
        records = [record for report in self.reports for record in report.records]
        ends = [record.ended for record in records if record.ended is not None]
        return max(ends, default=0.0) - min(record.request.arrival for record in records)


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """One replica under one load."""

    load: float  # requests per second that arrive
    goodput: float  # requests per second that meet the targets
    attainment: float  # their share of all


@dataclass(frozen=True, slots=True)
class Plan:
    """A configuration that meets the targets, and with how many replicas."""

    configuration: Configuration
    replicas: int
    load: float  # requests per second that one replica sustains
    attainment: float  # of the whole trace on that many replicas


def run_fleet(
    trace: Trace,
    configuration: Configuration,
    replicas: int,
    targets: Targets,
    *,
    least_load: bool = False,
    most_misses: float = math.inf,
) -> Fleet:
    """Simulates replicas that share a trace.

    Requests go round the replicas, or with `least_load` to the one with the fewest unfinished
    requests. The simulation ends early once more than `most_misses` have missed their targets.
    """
    engines = [configuration.engine(trace, targets) for _ in range(replicas)]
    for number, request in enumerate(trace):
        engine = engines[number % replicas]
        if least_load:
            for each in engines:
                each.run_until(request.arrival)
            # Where several are as idle as one another they take turns.
            engine = min(
                engines[number % replicas :] + engines[: number % replicas],
                key=lambda each: each.pending,
            )
        else:
            engine.run_until(request.arrival)
        engine.submit(request, number)
        if sum(each.missed for each in engines) > most_misses:
            break
    for engine in engines:
        others = sum(each.missed for each in engines if each is not engine)
        engine.finish(most_misses=most_misses - others)
    return Fleet([engine.report() for engine in engines])


def meets(
    trace: Trace,
    configuration: Configuration,
    replicas: int,
    targets: Targets,
    attainment: float,
    *,
    least_load: bool = False,
) -> bool:
    """Whether at least that share of the trace meets the targets."""
    most = allowed_misses(len(trace), attainment)
    fleet = run_fleet(
        trace, configuration, replicas, targets, least_load=least_load, most_misses=most
    )
    return fleet.good >= len(trace) - most


def allowed_misses(requests: int, attainment: float) -> int:
    """How many may miss. A hair more than the product, so that rounding never takes one away."""
    return math.floor(requests * (1 - attainment) + 1e-9)


def sustained_load(
    trace: Trace, configuration: Configuration, targets: Targets, attainment: float
) -> float:
    """The most requests per second one replica takes within its targets, to about 3 %.

    The trace is played faster or slower; infinite where it has no rate, or none is too high.
    Raises `Unattainable` where none is low enough.
    """
    obstacle = idle_obstacle(trace, configuration, targets, attainment)
    if obstacle:
        raise Unattainable(obstacle)
    rate = mean_rate(trace)
    if rate == math.inf:
        return math.inf

    def met(load: float) -> bool:
        return meets(at_rate(trace, load), configuration, 1, targets, attainment)

    low = high = rate
    steps = 0
    if met(low):
        while met(high := high * 2):
            low, steps = high, steps + 1
            if steps > _STEPS:
                return math.inf
    else:
        while not met(low := low / 2):
            high, steps = low, steps + 1
            if steps > _STEPS:
                raise Unattainable(
                    f"{configuration.name}: no load is low enough for "
                    f"{attainment:.2%} of the requests to meet the targets"
                )
    while high / low > PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if met(middle) else (low, middle)
    return low


def plan_replicas(
    trace: Trace,
    configuration: Configuration,
    targets: Targets,
    attainment: float,
    *,
    least_load: bool = False,
    most: int = 4096,
) -> Plan:
    """The fewest replicas with which the trace, as it is, meets the targets.

    The load that one replica sustains says where to begin. Raises `Unattainable`.
    """
    load = sustained_load(trace, configuration, targets, attainment)

    def met(replicas: int) -> bool:
        return meets(trace, configuration, replicas, targets, attainment, least_load=least_load)

    high = max(1, min(most, math.ceil(mean_rate(trace) / load))) if load < math.inf else 1
    low = 0  # replicas that do not do; none never does
    while not met(high):
        low, high = high, high * 2
        if low >= min(most, len(trace)):
            raise Unattainable(
                f"{configuration.name}: {low} replicas still miss the targets, for too many "
                "requests of the trace arrive at once"
            )
    while high - low > 1:
        # From the estimate down in small steps: it is nearly right, and few replicas are cheap.
        middle = max((low + high) // 2, high - 2)
        low, high = (low, middle) if met(middle) else (middle, high)
    fleet = run_fleet(trace, configuration, high, targets, least_load=least_load)
    return Plan(configuration, high, load, fleet.good / len(trace))


def goodput_curve(
    trace: Trace, configuration: Configuration, targets: Targets, loads: Sequence[float]
) -> list[LoadPoint]:
    """Goodput of one replica against the load offered to it."""
    points: list[LoadPoint] = []
    for load in loads:
        fleet = run_fleet(at_rate(trace, load), configuration, 1, targets)
        points.append(LoadPoint(load, fleet.good / fleet.seconds, fleet.good / len(trace)))
    return points


def idle_obstacle(
    trace: Trace, configuration: Configuration, targets: Targets, attainment: float
) -> str:
    """Why too many requests of the trace would miss the targets even alone on a replica; or ""."""
    cost, config, name = configuration.make_cost(), configuration.config, configuration.name
    positions = min(config.max_model_len, (config.num_pages - 1) * config.page_size)
    prompt = int(percentile([request.prompt_tokens for request in trace], attainment))
    if prompt >= positions:
        return f"{name}: a prompt of {prompt} tokens does not fit {positions} positions"
    first = idle_ttft(cost, config, prompt)
    if first > targets.ttft:
        return (
            f"{name}: the first token of a prompt of {prompt} tokens takes {first:.3g} s on an "
            f"idle replica, more than the TTFT target of {targets.ttft:g} s"
        )
    lengths = [r.prompt_tokens + (r.output_tokens if r.output_tokens > 1 else 0) for r in trace]
    length = int(percentile(lengths, attainment))
    gap = cost.seconds(StepShape(1, 1, min(length, positions), 0))
    if gap > targets.mtpot:
        return (
            f"{name}: one token after {length} others takes {gap:.3g} s on an idle replica, "
            f"more than the MTPOT target of {targets.mtpot:g} s"
        )
    return ""


def idle_ttft(cost: StepCost, config: SchedulerConfig, prompt: int) -> float:
    """Seconds from arrival to the first token of a request that is alone."""
    seconds, fed = 0.0, 0
    while fed < prompt:
        use = min(prompt - fed, config.max_step_tokens)
        seconds += cost.seconds(StepShape(1, use, 0, chunk_pairs(use, fed)))
        fed += use
    return seconds
