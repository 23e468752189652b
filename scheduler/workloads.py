"""Made traces: lengths and arrivals drawn from distributions, for simulation and planning.

Every maker takes a numpy generator, the mean arrivals per second, how many requests, and a scale
for all lengths, so that a small pool can be put under the same pressure as a large one. Nearly all
requests carry a cap on their output far above what they produce, as real ones do.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from scheduler.trace import TraceRequest

Lengths = NDArray[np.int64]
Times = NDArray[np.float64]
Make = Callable[[Generator, float, int, float], list[TraceRequest]]

LONGEST_ANSWER = 8192


@dataclass(frozen=True, slots=True)
class Workload:
    """A maker under its name."""

    about: str
    make: Make  # (generator, requests per second, count, scale of all lengths)


def lognormal(rng: Generator, count: int, mean: float, sigma: float, most: int) -> Lengths:
    """Whole lengths from 1 to `most`; `mean` is that of the distribution before it is cut off."""
    draws = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.rint(draws), 1, most).astype(np.int64)


def uniform(rng: Generator, count: int, low: int, high: int) -> Lengths:
    return rng.integers(low, high, count, endpoint=True)


def poisson(rng: Generator, rate: float, count: int) -> Times:
    """Arrivals at random, the first after one gap."""
    return np.cumsum(rng.exponential(1 / rate, count))


def chat_caps(rng: Generator, count: int) -> Lengths:
    """What chat clients send as max_tokens: a round number, chosen once for all requests."""
    return rng.choice(np.array([1024, 2048, 4096]), count, p=[0.3, 0.5, 0.2])


def assemble(
    arrivals: Times, prompts: Lengths, outputs: Lengths, caps: Lengths | int, scale: float
) -> list[TraceRequest]:
    """Requests with all lengths scaled; outputs end at their cap."""
    caps = np.broadcast_to(np.asarray(caps), outputs.shape)
    outputs = np.minimum(outputs, caps)
    columns = [np.maximum(np.rint(x * scale), 1).astype(int) for x in (prompts, outputs, caps)]
    return [
        TraceRequest(float(arrival), int(prompt), int(output), int(cap))
        for arrival, prompt, output, cap in zip(arrivals, *columns, strict=True)
    ]


def chat(rng: Generator, rate: float, count: int, scale: float) -> list[TraceRequest]:
    prompts = lognormal(rng, count, 200, 1.2, 4096)
    outputs = lognormal(rng, count, 200, 0.9, 4096)
    return assemble(poisson(rng, rate, count), prompts, outputs, chat_caps(rng, count), scale)


def decode_heavy(rng: Generator, rate: float, count: int, scale: float) -> list[TraceRequest]:
    prompts, outputs = uniform(rng, count, 32, 1024), uniform(rng, count, 2048, 4096)
    return assemble(poisson(rng, rate, count), prompts, outputs, LONGEST_ANSWER, scale)


def prefill_heavy(rng: Generator, rate: float, count: int, scale: float) -> list[TraceRequest]:
    prompts, outputs = uniform(rng, count, 2048, 6144), uniform(rng, count, 32, 512)
    return assemble(poisson(rng, rate, count), prompts, outputs, 2048, scale)


def reasoning(rng: Generator, rate: float, count: int, scale: float) -> list[TraceRequest]:
    prompts = lognormal(rng, count, 200, 0.8, 2048)
    outputs = lognormal(rng, count, 1500, 0.9, LONGEST_ANSWER)
    return assemble(poisson(rng, rate, count), prompts, outputs, LONGEST_ANSWER, scale)


def multi_turn(rng: Generator, rate: float, count: int, scale: float) -> list[TraceRequest]:
    """Conversations of four turns on average, each prompt holding all that was said before.

    The trace begins in the middle of some, as a server's day does.
    """
    turns, think = 4, 20.0  # on average; seconds to read, think and type
    requests: list[TraceRequest] = []
    later: list[float] = []  # a heap of the arrivals after `start`: conversations may come between
    start, group = -4 * turns * think, 0
    while len(requests) - len(later) < count:
        start += float(rng.exponential(turns / rate))
        while later and later[0] <= start:
            heapq.heappop(later)
        length = int(rng.geometric(1 / turns))
        said = lognormal(rng, length, 120, 1.0, 2048)
        outputs = lognormal(rng, length, 200, 0.8, 2048)
        arrivals = start + np.cumsum(rng.exponential(think, length))
        history = 0
        for arrival, words, output in zip(arrivals, said, outputs, strict=True):
            answer = max(1, round(int(output) * scale))
            history += max(1, round(int(words) * scale))
            if arrival >= 0:
                name, cap = f"conversation {group}", max(round(2048 * scale), answer)
                requests.append(TraceRequest(float(arrival), history, answer, cap, name, history))
                heapq.heappush(later, float(arrival))
            history += answer
            if history > LONGEST_ANSWER * scale:
                break
        group += 1
    return sorted(requests, key=lambda request: request.arrival)[:count]


def bursts(rng: Generator, rate: float, count: int, scale: float) -> list[TraceRequest]:
    """Calm and burst take turns, at random times: four fifths calm, bursts eight times as dense."""
    calm_share, ratio, burst_seconds = 0.8, 8.0, 10.0
    calm = rate / (calm_share + (1 - calm_share) * ratio)
    seconds = (burst_seconds * calm_share / (1 - calm_share), burst_seconds)
    arrivals: list[float] = []
    now, state = 0.0, 0
    while len(arrivals) < count:
        end = now + float(rng.exponential(seconds[state]))
        dense = calm * (1.0, ratio)[state]
        arrivals += np.sort(rng.uniform(now, end, rng.poisson(dense * (end - now)))).tolist()
        now, state = end, 1 - state
    prompts = lognormal(rng, count, 200, 1.2, 4096)
    outputs = lognormal(rng, count, 600, 0.7, 4096)
    return assemble(np.array(arrivals[:count]), prompts, outputs, 4096, scale)


def shift(rng: Generator, rate: float, count: int, scale: float) -> list[TraceRequest]:
    """Half way through, answers become five times as long."""
    prompts = lognormal(rng, count, 200, 1.2, 4096)
    outputs = np.concatenate(
        [
            lognormal(rng, count // 2, 200, 0.9, 4096),
            lognormal(rng, count - count // 2, 1000, 0.6, 4096),
        ]
    )
    return assemble(poisson(rng, rate, count), prompts, outputs, 4096, scale)


WORKLOADS = {
    "chat": Workload("lognormal prompts and answers of 200 tokens on average", chat),
    "decode-heavy": Workload("answers of 2 to 4 thousand tokens", decode_heavy),
    "prefill-heavy": Workload("prompts of 2 to 6 thousand tokens, short answers", prefill_heavy),
    "reasoning": Workload("lognormal answers of 1,500 tokens on average, up to 8,192", reasoning),
    "multi-turn": Workload("conversations, each prompt beginning with all before", multi_turn),
    "bursts": Workload("answers of 600 tokens on average, arriving in bursts", bursts),
    "shift": Workload("chat whose answers become five times as long half way", shift),
}
