"""Drives a worker with plans of its own, the way the engine's loop does: one step ahead."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.gpu_device import Machine
from engine.build import build_worker
from engine.config import EngineConfig
from engine.scheduling import build_scheduler
from scheduler.plan import Admit, Row, StepPlan, StepResult
from scheduler.request import Request, SamplingParams
from scheduler.scheduler import Scheduler
from worker.executor import PendingStep
from worker.worker import Worker

WARM = 5  # steps
GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Of steps in a row."""

    seconds: float  # of the device, median
    wall: float  # from result to result, mean
    idle: float  # the longest time within or between steps in which the device did nothing, median


class Engine:
    """A worker built by the engine's own code, with sequences that this class makes up."""

    def __init__(self, on: Machine, model: Path, **options: Any) -> None:
        defaults = {"load_format": "dummy", "drafters": (), "swap_bytes": 0, "compile": False}
        self.on = on
        self.config = EngineConfig.of(model=str(model), device=on.device, **{**defaults, **options})
        self.worker, self.limits = build_worker(self.config, lambda _: None, patient=True)
        self._random = random.Random(0)
        self._step = self._epoch = 0

    def close(self) -> None:
        self.worker.close()

    def decode(self, rows: int, context: int, steps: int) -> StepTimes:
        """Plain decoding: `rows` sequences of `context` positions."""
        live = self._begin(rows, context, WARM + steps)
        plans = [self._plan(live) for _ in range(WARM + steps)]
        results, stamps = self._run(plans)
        seconds = [result.seconds for result in results[WARM:]]
        wall = (stamps[-1] - stamps[WARM - 1]) / steps
        idle = max(wall - mean(seconds), 0.0)
        if not self.on.dry:
            live = self._begin(rows, context, WARM + steps)
            idle = longest_idle(lambda: self._run([self._plan(live) for _ in range(steps)]), steps)
        return StepTimes(median(seconds), wall, idle)

    def prefill(self, tokens: int) -> float:
        """Seconds of the device for one prompt in one step; the best of three."""
        found = []
        for _ in range(3):
            admit = self._admit(1, 0, tokens, range(1, self._pages(tokens) + 1))
            row = Row(1, admit.epoch, self._tokens(tokens), True)
            found.append(self._run([self._plan([row], (admit,))])[0][0].seconds)
        return min(found)

    def serve(self, prompts: Sequence[Sequence[int]], outputs: int) -> float:
        """Seconds from the first prompt to the last token, through the scheduler."""
        scheduler = build_scheduler(self.config, self.limits)
        for i, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=outputs, temperature=0.0)
            scheduler.add(Request(f"r{i}", tuple(prompt), params, 0.0), 0.0)
        started = time.perf_counter()
        drive(scheduler, self.worker)
        return time.perf_counter() - started

    def _begin(self, rows: int, context: int, steps: int) -> list[Row]:
        """Sequences that stand where decoding starts; their rows from then on."""
        page, pages = self.limits.page_size, self._pages(context + steps + 2)
        self._fill(rows * pages + 1)
        cached = context // page * page
        admits = [
            self._admit(slot, cached, cached + 1, range(1 + (slot - 1) * pages, 1 + slot * pages))
            for slot in range(1, rows + 1)
        ]
        begin = [Row(a.slot, a.epoch, self._tokens(1), True) for a in admits]
        self._run([self._plan(begin, tuple(admits))])
        return [Row(a.slot, a.epoch, None, True) for a in admits]

    def _fill(self, pages: int) -> None:
        """Keys and values that are no zeros."""
        if pages > self.limits.num_pages:
            raise SystemExit(f"{pages} pages are needed, {self.limits.num_pages} fit.")
        for layer in self.worker.kv:
            if layer.dtype.is_floating_point and layer.element_size() > 1:
                layer[1:pages].normal_()
            else:
                layer[1:pages].view(torch.uint8).random_(0, 96)  # no NaN as 8-bit floats either

    def _pages(self, positions: int) -> int:
        return -(-positions // self.limits.page_size)

    def _admit(self, slot: int, cached: int, prompt: int, pages: Sequence[int]) -> Admit:
        self._epoch += 1
        return Admit(slot, self._epoch, GREEDY, 0, prompt, tuple(pages), self._tokens(cached))

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.choices(range(self.worker.facts.vocab_size), k=count))

    def _plan(self, rows: Sequence[Row], admits: tuple[Admit, ...] = ()) -> StepPlan:
        self._step += 1
        return StepPlan(self._step, admits, tuple(rows))

    def _run(self, plans: Sequence[StepPlan]) -> tuple[list[StepResult], list[float]]:
        """Results, and when each was there."""
        results: list[StepResult] = []
        stamps: list[float] = []
        in_flight: deque[PendingStep] = deque()
        for plan in [*plans, None]:
            if plan is not None:
                in_flight.append(self.worker.launch(plan))
            while in_flight and (len(in_flight) > 1 or plan is None):
                results.append(in_flight.popleft().wait())
                stamps.append(time.perf_counter())
        return results, stamps


@contextmanager
def engine(on: Machine, model: Path, **options: Any) -> Iterator[Engine]:
    """An engine, and its memory given back."""
    made = Engine(on, model, **options)
    try:
        yield made
    finally:
        made.close()
        del made
        on.free()


def drive(scheduler: Scheduler, worker: Worker) -> None:
    """As engine/core.py, without anybody to talk to."""
    in_flight: deque[tuple[StepPlan, Any]] = deque()
    while scheduler.has_work():
        plan = scheduler.plan(time.perf_counter())
        scheduler.take_outputs()
        if plan is not None:
            in_flight.append((plan, worker.launch(plan)))
        if in_flight and (len(in_flight) > 1 or plan is None):
            settled, pending = in_flight.popleft()
            scheduler.settle(settled, pending.wait(), time.perf_counter())


def longest_idle(run: Any, steps: int) -> float:
    """Seconds: the median of as many of the longest times without a kernel as there are steps.

    By torch's profiler. If the host comes late once a step, it is among these.
    """
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        run()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type.name == "CUDA"
    )
    gaps, end = [], spans[0][1] if spans else 0.0
    for start, stop in spans:
        gaps.append(max(start - end, 0.0))
        end = max(end, stop)
    longest = sorted(gaps, reverse=True)[:steps]
    return median(longest) / 1e6 if longest else 0.0


def limits_for(rows: int, context: int, page_size: int = 16) -> dict[str, int]:
    """Options of an engine for so many sequences of that length."""
    length = context + 128
    return {
        "max_num_seqs": rows,
        "max_model_len": length,
        "num_pages": rows * -(-length // page_size) + 1,
    }
