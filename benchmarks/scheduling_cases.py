"""What a tenant, a stream and the scheduler itself feel: single cases, most of them simulated."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np

from benchmarks.report import Row
from benchmarks.scheduling_policies import SEED, Scenario, make_trace, play, settle_collector
from scheduler.admission import make_policy
from scheduler.outcome import Targets
from scheduler.plan import RowResult, StepResult
from scheduler.request import Request, SamplingParams, SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.simulate import simulate
from scheduler.step_cost import StepCost
from scheduler.trace import TraceRequest, merge
from scheduler.workloads import WORKLOADS


def flood(scenario: Scenario) -> Row:
    """A tenant's p95 TTFT while another floods the server, over what it is alone."""
    rng = np.random.default_rng(SEED)
    quiet = [replace(r, tenant="quiet") for r in WORKLOADS["chat"].make(rng, 2.0, 400, 1.0)]
    loud = [replace(r, tenant="loud") for r in WORKLOADS["chat"].make(rng, 60.0, 12_000, 1.0)]

    def p95(trace: list[TraceRequest]) -> float:
        report = play(scenario, trace, make_policy())
        mine = sorted(r.ttft for r in report.records if r.request.tenant == "quiet")
        return mine[int(0.95 * len(mine))]

    return Row(
        "quiet tenant's p95 TTFT, flooded over alone",
        p95(merge(quiet, loud)) / p95(quiet),
        2.0,
        "at most",
    )


def long_prompt(scenario: Scenario, target: float) -> list[Row]:
    """The largest gap of 8 running streams when a prompt of 8k tokens arrives among them."""
    streams = [TraceRequest(0.001 * i, 64, 2000, 2000) for i in range(8)]
    late = TraceRequest(2.0, 8000, 16, 16)
    rows = []
    for name, mtpot in (("without a target", None), (f"target {target * 1e3:.0f} ms", target)):
        config = replace(scenario.config(), mtpot_target=mtpot, ttft_target=None)
        cost = StepCost.from_profile(scenario.profile)
        scheduler = Scheduler(config, cost=cost)
        report = simulate(
            [*streams, late], scheduler, StepCost.from_profile(scenario.profile), Targets()
        )
        gap = max(r.gap for r in report.records[:8])
        rows.append(
            Row(
                f"8k prompt among 8 streams, {name}: largest gap, ms",
                1e3 * gap,
                1e3 * mtpot if mtpot else None,
                "at most",
            )
        )
        rows.append(
            Row(f"8k prompt among 8 streams, {name}: its TTFT, ms", 1e3 * report.records[8].ttft)
        )
    return rows


def planning_row(running: int = 512, waiting: int = 1000) -> Row:
    """Milliseconds of a planning step that surveys the whole queue: median of many."""
    config = SchedulerConfig(
        num_pages=running * 20,
        page_size=16,
        max_num_seqs=running,
        max_step_tokens=8192,
        max_model_len=4096,
    )
    scheduler = Scheduler(config)
    window = scheduler.policy.window
    assert window is not None
    rng = np.random.default_rng(SEED)
    for length in rng.lognormal(5, 0.8, 1000).astype(int).tolist():
        window.add(length + 1, cut_short=False)

    def add(i: int) -> None:
        params = SamplingParams(max_tokens=2048, stop_token_ids=frozenset((0,)))
        scheduler.add(Request(f"r{i}", (i + 2, *(1,) * 63), params, arrival=float(i)), float(i))

    for i in range(running + waiting):
        add(i)
    settle_collector()
    times: list[float] = []
    count = running + waiting
    for step in range(400):
        start = time.perf_counter()
        plan = scheduler.plan(float(count + step))
        seconds = time.perf_counter() - start
        if plan is None:
            break
        if len(plan.rows) >= 0.9 * running:
            times.append(seconds)
        # One answer in 200 ends each step, so that every step has somebody to survey for.
        rows = []
        for k, row in enumerate(plan.rows):
            ends = row.chunk is None and (k + step) % 200 == 0
            rows.append(RowResult(tokens=((0 if ends else 1),) if row.samples else ()))
        for output in scheduler.settle(
            plan, StepResult(plan.step, tuple(rows)), float(count + step)
        ):
            if output.finish is not None:
                add(count)
                count += 1
    return Row(
        f"planning step at {running} running, {waiting} waiting, ms (median)",
        1e3 * statistics.median(times),
        2.0,
        "at most",
    )


def speed_row(scenario: Scenario, seconds: float) -> Row:
    """Simulated seconds of a 50 request/s chat trace per real minute, on one core."""
    settle_collector()
    trace = make_trace("chat", 50.0, seconds, 1.0)
    larger = replace(scenario, kv_tokens=4 * scenario.kv_tokens)
    start = time.perf_counter()
    report = play(larger, trace, make_policy())
    return Row(
        "simulated seconds of 50 requests/s per real minute",
        60 * report.seconds / (time.perf_counter() - start),
        1000.0,
    )
