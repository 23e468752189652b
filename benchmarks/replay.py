"""Replays an open-loop trace against a server, and judges it as the simulator judges its own.

The bundled model's texts end after a few dozen tokens. To get the lengths of a trace, each request
is first answered once, untimed, for exactly as many tokens; in the timed run the end tokens are
ignored and the last of those tokens that had not occurred before is a stop token. A text depends on
the prompt and the seed, so it ends there by itself, `max_tokens` far away, and the scheduler knows
no more of its length than of any other. What a simulation is given is what came of the timed run.
"""

from __future__ import annotations

import asyncio
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from benchmarks.report import percentile
from benchmarks.streaming import Connection, Endpoint, Sample
from benchmarks.workload import call
from scheduler.outcome import SimulationReport, Targets
from scheduler.trace import TraceRequest

TIMEOUT = 300.0  # seconds a request
POLL = 0.25  # seconds between two looks at /load
STRETCH = 1.0  # seconds over which the time of a step is averaged, at least
LEARNERS = 32  # requests at once while texts are learnt


@dataclass(frozen=True, slots=True)
class Scripted:
    """One request of a trace, with what makes its text."""

    request: TraceRequest
    prompt: list[int]
    seed: int
    stop: int = 0  # the token that ends it

    def body(self, model: str) -> dict[str, Any]:
        """For the timed run."""
        return {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.request.max_tokens,
            "temperature": 1,
            "seed": self.seed,
            "ignore_eos": True,
            "stop_token_ids": [self.stop],
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of one request. Seconds of the trace."""

    arrival: float
    ttft: float  # infinite when nothing came
    gap: float  # the largest between two events with text
    ended: float
    tokens: int
    refused: bool = False
    failed: str = ""

    def met(self, targets: Targets) -> bool:
        ok = not self.refused and not self.failed
        return ok and self.ttft <= targets.ttft and self.gap <= targets.mtpot


@dataclass(frozen=True, slots=True)
class Slowdown:
    """How many times as long as in the profile steps took in a run."""

    mean: float
    since: tuple[float, ...] = ()  # seconds of the run: from then on,
    times: tuple[float, ...] = ()  # it was so many

    @classmethod
    def of(cls, looks: Sequence[tuple[float, float, float]]) -> Slowdown:
        """Of the seconds of the run at each look, the seconds of all steps until then, and the same
        by the profile."""
        if not looks or looks[-1][2] <= looks[0][2]:
            return cls(math.nan)
        since: list[float] = []
        times: list[float] = []
        first = looks[0]
        for look in looks[1:]:
            seconds, took, profiled = (new - old for new, old in zip(look, first, strict=True))
            if seconds >= STRETCH and profiled > 0.0:
                since.append(first[0])
                times.append(took / profiled)
                first = look
        (_, took0, profiled0), (_, took1, profiled1) = looks[0], looks[-1]
        return cls((took1 - took0) / (profiled1 - profiled0), tuple(since), tuple(times))

    def at(self, now: float) -> float:
        """Before the first look it is as after it."""
        return self.times[max(bisect_right(self.since, now) - 1, 0)] if self.times else self.mean


@dataclass(frozen=True, slots=True)
class Played:
    """A trace in one world."""

    fates: list[Fate]
    used: float  # share of KV pages, mean from the first to the last arrival
    slowdown: Slowdown  # in the same time

    def figures(self, targets: Targets) -> dict[str, float]:
        """Rates are over the time from the first arrival to the last end."""
        fates = self.fates
        seconds = max(f.ended for f in fates) - min(f.arrival for f in fates)
        good = [f for f in fates if f.met(targets)]
        taken = [f for f in fates if not f.refused and not f.failed]
        ttft = [f.ttft for f in taken]
        return {
            "requests": float(len(fates)),
            "refused": float(sum(f.refused for f in fates)),
            "seconds": seconds,
            "goodput requests/s": len(good) / seconds,
            "within targets": len(good) / len(fates),
            "output tok/s": sum(f.tokens for f in taken) / seconds,
            "TTFT p50 s": percentile(ttft, 0.5),
            "TTFT p99 s": percentile(ttft, 0.99),
            "largest gap p50 s": percentile([f.gap for f in taken], 0.5),
            "largest gap p99 s": percentile([f.gap for f in taken], 0.99),
            "pages in use": self.used,
        }


def with_prompts(
    trace: Sequence[TraceRequest], vocabulary: Sequence[int], seed: int
) -> list[Scripted]:
    """Prompts of random tokens, so that no two begin alike, and seeds."""
    rng = random.Random(seed)
    return [
        Scripted(request, rng.choices(vocabulary, k=request.prompt_tokens), rng.getrandbits(48))
        for request in trace
    ]


def last_new(tokens: Sequence[int]) -> tuple[int, int]:
    """The last token that had not occurred before, and how many tokens there are up to it."""
    seen: set[int] = set()
    found = (tokens[0], 1)
    for number, token in enumerate(tokens, 1):
        if token not in seen:
            seen.add(token)
            found = (token, number)
    return found


def learn(endpoint: Endpoint, model: str, script: Sequence[Scripted]) -> list[Scripted]:
    """Finds the stop tokens, and cuts the lengths to where they stand."""

    def one(item: Scripted) -> Scripted:
        asked = {
            "model": model,
            "prompt": item.prompt,
            "max_tokens": item.request.output_tokens,
            "temperature": 1,
            "seed": item.seed,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer: Any = call(endpoint, "/v1/completions", asked, timeout=TIMEOUT)
        stop, length = last_new(answer["choices"][0]["token_ids"])
        return replace(item, stop=stop, request=replace(item.request, output_tokens=length))

    with ThreadPoolExecutor(LEARNERS) as threads:
        return list(threads.map(one, script))


async def replay(
    endpoint: Endpoint, bodies: Sequence[bytes], arrivals: Sequence[float]
) -> tuple[float, list[Sample]]:
    """Sends each request at its time, whatever became of the others. The start, and samples."""
    idle: list[Connection] = []

    async def one(data: bytes) -> Sample:
        connection = idle.pop() if idle else Connection(endpoint)
        sample = await connection.send(data, TIMEOUT)
        idle.append(connection)
        return sample

    tasks: list[asyncio.Task[Sample]] = []
    start = perf_counter()
    for data, arrival in zip(bodies, arrivals, strict=True):
        await asyncio.sleep(max(start + arrival - perf_counter(), 0.0))
        tasks.append(asyncio.create_task(one(data)))
    samples = await asyncio.gather(*tasks)
    for connection in idle:
        connection.close()
    return start, samples


async def watched(
    endpoint: Endpoint, bodies: Sequence[bytes], arrivals: Sequence[float], since: float
) -> Played:
    """Replays, and looks at the server's pages and steps between `since` and the last arrival."""
    used: list[float] = []
    looks: list[tuple[float, float, float]] = []

    async def look(start: float) -> None:
        while True:
            await asyncio.sleep(POLL)
            load: Any = await asyncio.to_thread(call, endpoint, "/load")
            now = perf_counter() - start
            if since <= now <= arrivals[-1]:
                used.append(load["kv_usage"])
                looks.append((now, load["step_seconds"], load["step_seconds_profiled"]))

    looking = asyncio.create_task(look(perf_counter()))
    try:
        start, samples = await replay(endpoint, bodies, arrivals)
    finally:
        looking.cancel()
    fates = [fate_of(sample, start) for sample in samples]
    return Played(fates, sum(used) / len(used) if used else math.nan, Slowdown.of(looks))


def fate_of(sample: Sample, start: float) -> Fate:
    """`start`: the replay's, on the clock of the sample."""
    error = sample.error or ""
    refused = error.startswith("HTTP 429")
    return Fate(
        arrival=sample.started - start,
        ttft=math.inf if sample.first is None else sample.first - sample.started,
        gap=max(sample.gaps, default=0.0),
        ended=sample.finished - start,
        tokens=sample.tokens,
        refused=refused,
        failed="" if refused else error,
    )


def simulated(report: SimulationReport, start: float, end: float) -> Played:
    """The same of a simulation; pages are looked at between the two instants."""
    fates = [
        Fate(
            arrival=record.request.arrival,
            ttft=record.ttft,
            gap=record.gap,
            ended=record.request.arrival if record.ended is None else record.ended,
            tokens=record.output_tokens,
            refused=bool(record.refused),
        )
        for record in report.records
    ]
    return Played(fates, report.timeline.mean("used", start, end), Slowdown(1.0))


def observed(script: Sequence[Scripted], played: Played) -> list[TraceRequest]:
    """The trace as it was sent and answered; what was refused is as it was learnt."""
    return [
        replace(
            item.request,
            arrival=max(fate.arrival, 0.0),
            output_tokens=min(fate.tokens or item.request.output_tokens, item.request.max_tokens),
        )
        for item, fate in zip(script, played.fates, strict=True)
    ]


def without(played: Played, first: int) -> Played:
    """Less the first requests, which warmed up."""
    return replace(played, fates=played.fates[first:])
