"""The closed-loop load of the serving benchmark: streams, repeats, interleaving, ratios."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks.freezing import ProcessTree
from benchmarks.report import Row, median_interval, percentile
from benchmarks.streaming import Connection, Endpoint, Sample
from benchmarks.workload import PromptPool, texts_of_length


@dataclass(frozen=True, slots=True)
class Server:
    """One server under test, ready to be measured."""

    name: str
    endpoint: Endpoint
    model: str
    prompts: PromptPool
    process: ProcessTree | None  # frozen while another server is measured


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a server at every level."""

    chat: bool
    output_tokens: int
    rounds: int  # requests per stream and repeat
    timeout: float  # seconds a request


@dataclass(frozen=True, slots=True)
class Measure:
    """One repeat at one level. Times in milliseconds."""

    output_rate: float  # tokens a second
    ttft: list[float]
    gaps: list[float]
    tokens_per_event: float
    prompt_tokens: float  # mean
    cached_tokens: int
    client_share: float  # of one core
    errors: list[str]


def request_bytes(server: Server, load: Load, count: int) -> list[bytes]:
    """`count` requests with prompts that were not used before."""
    prompts = server.prompts.take(count)
    common = {
        "model": server.model,
        "max_tokens": load.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.chat:
        texts = texts_of_length(server.endpoint, server.model, prompts)
        bodies = [common | {"messages": [{"role": "user", "content": text}]} for text in texts]
        return [server.endpoint.post("/v1/chat/completions", body) for body in bodies]
    bodies = [common | {"prompt": prompt} for prompt in prompts]
    return [server.endpoint.post("/v1/completions", body) for body in bodies]


async def measure(server: Server, streams: int, load: Load) -> Measure:
    """One repeat: `streams` connections share `streams * rounds` requests."""
    requests = request_bytes(server, load, streams * load.rounds)
    queue = iter(requests)  # shared: each stream takes the next one when it is free
    samples: list[Sample] = []

    async def stream(connection: Connection) -> None:
        for request in queue:
            samples.append(await connection.send(request, load.timeout))

    connections = [Connection(server.endpoint) for _ in range(streams)]
    await asyncio.gather(*(connection.open() for connection in connections))
    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(stream(connection) for connection in connections))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    for connection in connections:
        connection.close()
    return summarise(samples, wall, cpu, load.output_tokens)


def summarise(samples: Sequence[Sample], wall: float, cpu: float, expected: int) -> Measure:
    """Failed requests count as errors only: their tokens and times are left out."""
    errors = [sample.error for sample in samples if sample.error is not None]
    good = [sample for sample in samples if sample.error is None]
    errors += [
        f"{sample.tokens} output tokens instead of {expected}"
        for sample in good
        if sample.output_tokens is not None and sample.tokens != expected
    ]
    tokens, events = sum(sample.tokens for sample in good), sum(sample.events for sample in good)
    return Measure(
        output_rate=tokens / wall,
        ttft=[(s.first - s.started) * 1e3 for s in good if s.first is not None],
        gaps=[gap * 1e3 for s in good for gap in s.gaps],
        tokens_per_event=tokens / events if events else math.nan,
        prompt_tokens=mean([s.prompt_tokens or 0 for s in good]) if good else math.nan,
        cached_tokens=sum(s.cached_tokens or 0 for s in good),
        client_share=cpu / wall,
        errors=errors,
    )


Results = dict[tuple[str, int], list[Measure]]  # by server name and number of streams


async def measure_all(
    servers: Sequence[Server], levels: Sequence[int], load: Load, repeats: int
) -> Results:
    """All servers at all levels, interleaved: A B, B A, A B, …"""
    results: Results = {}
    for level in levels:
        for repeat in range(-1, repeats):  # -1 warms up
            for server in servers if repeat % 2 == 0 else reversed(servers):
                for other in servers:
                    if other.process is not None and other is not server:
                        other.process.stop()
                if server.process is not None:
                    server.process.resume()
                one = await measure(server, level, load)
                if repeat >= 0:
                    results.setdefault((server.name, level), []).append(one)
                stage = "warm-up" if repeat < 0 else f"{repeat + 1}/{repeats}"
                print(
                    f"{server.name}, {level} streams, {stage}: {one.output_rate:.0f} tok/s"
                    + (f", {len(one.errors)} errors" if one.errors else ""),
                    file=sys.stderr,
                )
    return results


def figures(measures: Sequence[Measure]) -> dict[str, float]:
    """The medians over the repeats, by metric name."""

    def median(values: list[float]) -> float:
        return median_interval(values)[0]

    return {
        "output tok/s": median([m.output_rate for m in measures]),
        "TTFT p50 ms": median([percentile(m.ttft, 0.50) for m in measures]),
        "TTFT p99 ms": median([percentile(m.ttft, 0.99) for m in measures]),
        "inter-token p50 ms": median([percentile(m.gaps, 0.50) for m in measures]),
        "inter-token p99 ms": median([percentile(m.gaps, 0.99) for m in measures]),
        "tokens/event": median([m.tokens_per_event for m in measures]),
        "prompt tokens": median([m.prompt_tokens for m in measures]),
        "cached tokens": float(sum(m.cached_tokens for m in measures)),
        "client core share": median([m.client_share for m in measures]),
        "errors": float(sum(len(m.errors) for m in measures)),
    }


def ratio_rows(
    results: Results, first: str, other: str, level: int, target: float | None
) -> list[Row]:
    """`first` over `other`, pair by pair: output rate (more is better), TTFT (less is)."""
    pairs = list(zip(results[first, level], results[other, level], strict=True))
    rate, rate_low, rate_high = median_interval(
        [a.output_rate / b.output_rate if b.output_rate else math.nan for a, b in pairs]
    )
    ttft, ttft_low, ttft_high = median_interval(
        [percentile(a.ttft, 0.5) / percentile(b.ttft, 0.5) for a, b in pairs]
    )
    suffix = f"{first}/{other}, {level} streams"
    return [
        Row(f"output tok/s {suffix}", rate, target, interval=(rate_low, rate_high)),
        Row(f"TTFT p50 {suffix}", ttft, 1.0, "at most", (ttft_low, ttft_high)),
    ]
