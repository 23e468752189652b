"""Admission policies side by side on made traces, in simulation.

Each trace is offered at 1.2 times the load that the oracle, who knows all lengths, sustains. All
policies share the scheduler, its refusals included: they differ in the guess of length and in the
reserve alone. `aggressive` is swept over its watermark, on each trace separately.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial

import numpy as np

from benchmarks.report import Row
from scheduler.admission import Policy, make_policy
from scheduler.outcome import Record, SimulationReport, Targets
from scheduler.profile import Profile
from scheduler.request import SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.simulate import simulate, true_lengths
from scheduler.step_cost import StepCost
from scheduler.trace import TraceRequest
from scheduler.workloads import WORKLOADS

SEED = 20261126
SEEDS = 3  # traces of each kind, whose results are averaged
# Of some so many times as many: who is in time there hangs on how arrivals fall.
MORE_SEEDS = {"chat": 2, "reasoning": 2}
LOAD = 1.2  # of what the oracle sustains
TARGETS = Targets(ttft=10.0, mtpot=1.5)
WATERMARKS = (0.0, 0.05, 0.1, 0.2)
WARM = 500  # finished requests after which a window counts as warm

# Qwen3-8B in bf16 on an H200: sizes from its config.json; 4.3 TB/s and 790 TFLOP/s were measured on
# such a card, the step times are modelled from them.
H200_8B = Profile.roofline(
    weight_bytes=15.1e9,
    parameters=7.57e9,
    kv_bytes_per_token=147_456,
    bandwidth=4.3e12,
    flops=790e12,
    flops_per_pair=4 * 36 * 32 * 128,
    overhead=1e-3,
    host_bandwidth=50e9,
    model="Qwen3-8B",
    dtype="bfloat16",
    device="H200",
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One machine and one pool, under several traces."""

    profile: Profile
    kv_tokens: int
    max_num_seqs: int
    max_step_tokens: int
    scale: float  # of all lengths

    def config(self) -> SchedulerConfig:
        return SchedulerConfig(
            num_pages=self.kv_tokens // 16 + 1,
            page_size=16,
            max_num_seqs=self.max_num_seqs,
            max_step_tokens=self.max_step_tokens,
            max_model_len=16_384,
            ttft_target=TARGETS.ttft,
            mtpot_target=TARGETS.mtpot,
        )


# A pool that memory, not the number of slots, keeps from taking more.
SERVED = Scenario(H200_8B, kv_tokens=131_072, max_num_seqs=1024, max_step_tokens=2048, scale=1.0)

# Seconds of each trace: long enough to be warm for most of it.
SECONDS = {
    "chat": 60.0,
    "decode-heavy": 900.0,
    "prefill-heavy": 120.0,
    "reasoning": 300.0,
    "multi-turn": 90.0,
    "bursts": 150.0,
    "shift": 300.0,
}
# By trace, against conservative and against aggressive at its usual 5 %; and against its best.
LEAST_GAIN = {"decode-heavy": 1.5, "reasoning": 1.5, "chat": 1.1}
LEAST_OVER_SWEPT = {"bursts": 1.15, "shift": 1.15}
MOST_EVICTED = {"reasoning": 0.04, "shift": None, "bursts": None}


def make_trace(
    name: str, rate: float, seconds: float, scale: float, number: int = 0
) -> list[TraceRequest]:
    count = max(round(rate * seconds), 10)
    return WORKLOADS[name].make(np.random.default_rng(SEED + number), rate, count, scale)


def play(scenario: Scenario, trace: list[TraceRequest], policy: Policy) -> SimulationReport:
    cost = StepCost.from_profile(scenario.profile)
    scheduler = Scheduler(scenario.config(), policy=policy, cost=cost)
    return simulate(trace, scheduler, StepCost.from_profile(scenario.profile), TARGETS)


def policies(trace: list[TraceRequest]) -> dict[str, Callable[[], Policy]]:
    """By name, oracle first."""
    made: dict[str, Callable[[], Policy]] = {
        "oracle": partial(make_policy, "oracle", truth=true_lengths(trace)),
        "past-future": partial(make_policy, "past-future"),
        "conservative": partial(make_policy, "conservative"),
    }
    for watermark in WATERMARKS:
        made[f"aggressive {watermark:.1%}"] = partial(
            make_policy, "aggressive", watermark=watermark
        )
    return made


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is kept of one run, or the means of several."""

    trace: str
    policy: str
    load: float  # requests per second offered
    goodput: float  # requests per second
    throughput: float
    steady_throughput: float  # over the second half of the trace
    refused: float  # share
    ttft_p99: float
    mtpot_p99: float
    utilisation: float  # while requests arrive
    warm_utilisation: float  # once WARM requests have finished
    cold_utilisation: float  # during the last fifth of those
    first_utilisation: float  # from the first arrival until then
    evicted: float  # share of the accepted
    warm_evicted: float  # of those accepted after WARM ends
    late_evicted: float  # of those accepted WARM ends after the middle of the trace
    recomputed: float  # share of all tokens computed
    goodputs: tuple[float, ...]  # of each run
    series: Mapping[str, list[float]]


def outcome_of(name: str, policy: str, load: float, report: SimulationReport) -> Outcome:
    summary = report.summary()
    records = report.records
    last = records[-1].request.arrival
    ends = sorted(r.ended for r in records if r.reason and r.ended is not None)
    warm = ends[min(WARM, len(ends) // 2)]
    before = ends[int(0.8 * min(WARM, len(ends) // 2))]
    middle = records[len(records) // 2].request.arrival
    after = [end for end in ends if end > middle]
    settled = after[min(WARM, len(after) - 1)]
    accepted = [r for r in records if not r.refused]
    used = partial(report.timeline.mean, "used")
    # Over the time in which requests arrive and are served, the same for all policies.
    goodput = sum(r.ended <= last for r in report.good if r.ended is not None) / last
    return Outcome(
        trace=name,
        policy=policy,
        load=load,
        goodput=goodput,
        throughput=sum(end <= last for end in ends) / last,
        steady_throughput=sum(last / 2 < end <= last for end in ends) / (last / 2),
        refused=summary["refused"] / len(records),
        ttft_p99=summary["ttft_p99"] or 0.0,
        mtpot_p99=summary["mtpot_p99"] or 0.0,
        utilisation=used(0.0, last),
        warm_utilisation=used(warm, last) if warm < last - 2 else used(0.0, last),
        cold_utilisation=used(before, max(warm, before + 2)),
        first_utilisation=used(0.0, warm),
        evicted=summary["evicted_share"],
        warm_evicted=_evicted(accepted, warm),
        late_evicted=_evicted(accepted, settled),
        recomputed=summary["recomputed_share"],
        goodputs=(goodput,),
        series=report.timeline.columns(),
    )


def _evicted(accepted: list[Record], since: float) -> float:
    """The share of those that came after an instant."""
    came = [r for r in accepted if r.request.arrival > since]
    return sum(r.preemptions > 0 for r in came) / max(len(came), 1)


def mean_of(outcomes: list[Outcome]) -> Outcome:
    """Of one policy on several traces of a kind; the course over time is that of the first."""
    first = outcomes[0]
    means = {
        f.name: float(np.mean([getattr(o, f.name) for o in outcomes]))
        for f in fields(Outcome)
        if f.name not in ("trace", "policy", "goodputs", "series")
    }
    goodputs = tuple(o.goodput for o in outcomes)
    return Outcome(first.trace, first.policy, goodputs=goodputs, series=first.series, **means)


def offered_load(scenario: Scenario, name: str, seconds: float) -> float:
    """LOAD times what the oracle completes when more than it can take is offered."""
    rate = 1.0
    while True:
        trace = make_trace(name, rate, seconds, scenario.scale)
        report = play(scenario, trace, policies(trace)["oracle"]())
        if report.attainment < 0.85:
            return LOAD * outcome_of(name, "oracle", rate, report).steady_throughput
        rate *= 1.5 if report.attainment < 0.99 else 3.0


def run_one(
    scenario: Scenario, name: str, load: float, seconds: float, policy: str, number: int
) -> Outcome:
    settle_collector()
    trace = make_trace(name, load, seconds, scenario.scale, number)
    return outcome_of(name, policy, load, play(scenario, trace, policies(trace)[policy]()))


def settle_collector() -> None:
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)


def compare(
    scenario: Scenario, lengths: Mapping[str, float], pool: ProcessPoolExecutor, seeds: int = SEEDS
) -> dict[str, dict[str, Outcome]]:
    """Every policy on every kind of trace."""
    loads = {
        name: pool.submit(offered_load, scenario, name, seconds)
        for name, seconds in lengths.items()
    }
    runs = {}
    for name, seconds in lengths.items():
        load = loads[name].result()
        print(f"{name}: {load:.2f} requests/s offered", file=sys.stderr)
        for policy in policies([]):
            runs[name, policy] = [
                pool.submit(run_one, scenario, name, load, seconds, policy, number)
                for number in range(seeds * MORE_SEEDS.get(name, 1))
            ]
    outcomes: dict[str, dict[str, Outcome]] = {name: {} for name in lengths}
    for (name, policy), several in runs.items():
        outcomes[name][policy] = mean_of([run.result() for run in several])
        print(f"{name}, {policy}: {outcomes[name][policy].goodput:.2f} in time", file=sys.stderr)
    return outcomes


def rows_of(name: str, outcomes: Mapping[str, Outcome]) -> list[Row]:
    """What the policies came to on one trace, beside the targets."""
    ours, oracle = outcomes["past-future"], outcomes["oracle"]
    swept = max(
        (o for policy, o in outcomes.items() if policy.startswith("aggressive")),
        key=lambda o: o.goodput,
    )
    least = LEAST_GAIN.get(name)

    def over(what: str, other: Outcome, least: float | None = None) -> Row:
        ratio = ours.goodput / max(other.goodput, 1e-9)
        return Row(f"{name}: {what}", ratio, least, interval=_spread(ours, other, ratio))

    evicted = MOST_EVICTED.get(name, 0.02)
    rows = [
        over("goodput over conservative", outcomes["conservative"], least),
        over("goodput over aggressive 5 %", outcomes["aggressive 5.0%"], least),
        over(f"over {swept.policy}, best", swept, LEAST_OVER_SWEPT.get(name, 0.97)),
        over("goodput over oracle", oracle),
        Row(
            f"{name}: warm utilisation over oracle's",
            ours.warm_utilisation / max(oracle.warm_utilisation, 1e-9),
            0.93 if evicted else None,
        ),
        Row(f"{name}: requests evicted once warm", ours.warm_evicted, evicted, "at most"),
        Row(f"{name}: requests evicted", ours.evicted),
        Row(
            f"{name}: utilisation until {WARM} ends over oracle's until then",
            ours.first_utilisation / max(oracle.first_utilisation, 1e-9),
            0.9,
        ),
    ]
    if evicted is not None:  # where the load of the first is that of the others
        cold = ours.cold_utilisation / ours.warm_utilisation
        rows.append(Row(f"{name}: utilisation by {WARM} ends over warm", cold, 0.9))
    if name == "shift":
        rows.append(Row("shift: evicted after it", ours.late_evicted, 0.05, "at most"))
    return rows


def _spread(ours: Outcome, other: Outcome, ratio: float) -> tuple[float, float] | None:
    """Two standard errors of a ratio of means either way, by how it differs from trace to trace;
    None of a single one."""
    count = len(ours.goodputs)
    if count < 2:
        return None
    apart = np.array(ours.goodputs) - ratio * np.array(other.goodputs)
    error = 2 * float(np.std(apart, ddof=1)) / math.sqrt(count) / max(other.goodput, 1e-9)
    return ratio - error, ratio + error
