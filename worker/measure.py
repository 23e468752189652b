"""Measures what steps and page copies cost, through the way every step goes: `Worker.launch`.

Token ids are random, pages hold random keys and values (a page of zeros that was never written is
one page of memory for all, and faster than any real one). The same code runs on any device; on a
GPU it has not been run yet.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from scheduler.plan import Admit, Row, StepPlan
from scheduler.profile import StepShape, chunk_pairs
from scheduler.request import SamplingParams, SchedulerConfig
from worker.worker import Worker

STEPS = 3  # decode steps a load runs for in one go
PARAMS = SamplingParams(max_tokens=1 << 20, temperature=1.0)


@dataclass(frozen=True, slots=True)
class StepLoad:
    """A step to measure: live rows, each `context` positions long, and at most one chunk."""

    rows: int
    context: int
    chunk: int = 0  # tokens
    chunk_context: int = 0  # positions before it


class Bench:
    """Runs loads on a worker that nobody else uses."""

    def __init__(self, worker: Worker, limits: SchedulerConfig, seed: int = 0) -> None:
        self._worker = worker
        self._limits = limits
        self._random = random.Random(seed)
        self._step = self._epoch = 0
        self._filled = 1  # pages below this hold random numbers; page 0 is the null page

    def fits(self, load: StepLoad) -> bool:
        """Whether the worker could be given this load at all."""
        limits = self._limits
        longest = max(load.context, load.chunk_context + load.chunk)
        return (
            load.rows + (load.chunk > 0) <= limits.max_num_seqs
            and load.rows + load.chunk <= limits.max_step_tokens
            and longest + 2 + STEPS <= limits.max_model_len
            and sum(self._pages_of(load)) < limits.num_pages
        )

    def measure(self, load: StepLoad) -> list[tuple[StepShape, float]]:
        """The shapes of a few steps of this load, each a position further, and their seconds."""
        pages = self._pages_of(load)
        self._fill(sum(pages) + 1)
        admits: list[Admit] = []
        first = 1
        for cached, count in zip(self._cached(load), pages, strict=True):
            admits.append(self._admit(len(admits) + 1, cached, range(first, first + count)))
            first += count
        live = admits[: load.rows]
        # A token each makes the rows live, and begins the sequence of the chunk.
        begin = [Row(a.slot, a.epoch, self._tokens(1), a.slot <= load.rows) for a in admits]
        self._run(tuple(admits), begin)
        found = []
        for step in range(1 if load.chunk else STEPS):
            rows = [Row(a.slot, a.epoch, None, True) for a in live]
            pairs = 0
            if load.chunk:
                last = admits[-1]
                rows.append(Row(last.slot, last.epoch, self._tokens(load.chunk), True))
                pairs = chunk_pairs(load.chunk, len(last.cached) + 1)
            positions = sum(len(a.cached) + 2 + step for a in live)
            shape = StepShape(len(rows), load.rows + load.chunk, positions, pairs)
            found.append((shape, self._run((), rows)))
        return found

    def copy(self, pages: int) -> float:
        """Seconds to copy so many scattered pages to host memory or back, whichever is slower."""
        count = min(pages, self._limits.num_pages - 1)
        self._fill(count + 1)
        kv = self._worker.kv
        order = list(range(1, count + 1))
        self._random.shuffle(order)
        index = torch.tensor(order, device=kv[0].device)
        host = [
            torch.empty((count, *layer.shape[1:]), dtype=layer.dtype, pin_memory=layer.is_cuda)
            for layer in kv
        ]
        for buffer in host:
            buffer.zero_()  # touched: the first write of a page is not what is measured
        out = _timed(kv[0], lambda: [b.copy_(k[index]) for b, k in zip(host, kv, strict=True)])
        back = _timed(
            kv[0],
            lambda: [
                k.index_copy_(0, index, b.to(k.device)) for b, k in zip(host, kv, strict=True)
            ],
        )
        return max(out, back)

    def _cached(self, load: StepLoad) -> list[int]:
        """Positions, whole pages of them, that each sequence has when it is admitted."""
        size = self._limits.page_size
        contexts = [load.context] * load.rows + [load.chunk_context] * (load.chunk > 0)
        return [context // size * size for context in contexts]

    def _pages_of(self, load: StepLoad) -> list[int]:
        """Of each sequence, for all it will be given."""
        size = self._limits.page_size
        more = [1 + STEPS] * load.rows + [1 + load.chunk] * (load.chunk > 0)
        return [-(-(a + b) // size) for a, b in zip(self._cached(load), more, strict=True)]

    def _admit(self, slot: int, cached: int, pages: Sequence[int]) -> Admit:
        self._epoch += 1
        return Admit(slot, self._epoch, PARAMS, 0, cached + 1, tuple(pages), self._tokens(cached))

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.choices(range(self._worker.facts.vocab_size), k=count))

    def _run(self, admits: tuple[Admit, ...], rows: Sequence[Row]) -> float:
        self._step += 1
        return self._worker.launch(StepPlan(self._step, admits, tuple(rows))).wait().seconds

    def _fill(self, end: int) -> None:
        """Random numbers into the pages below `end`: the same page over and over, each its own
        memory."""
        if end <= self._filled:
            return
        for layer in self._worker.kv:
            layer[self._filled : end] = torch.randn_like(layer[0])
        self._filled = end


def _timed(on: Tensor, copy: Callable[[], object]) -> float:
    """The median of a few runs, after one that warms up."""
    times = []
    for _ in range(6):
        started = time.perf_counter()
        copy()
        if on.is_cuda:
            torch.cuda.synchronize(on.device)
        times.append(time.perf_counter() - started)
    return median(times[1:])
