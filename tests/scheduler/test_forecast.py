"""The forecast against a step-by-step count of pages."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from scheduler.forecast import LAG, Batch, Forecast, Growth

# Length, remaining, pace, pages held together with others.
Member = tuple[int, int, float, list[int]]


def brute_force(members: list[Member], page_size: int) -> int:
    """The peak, by walking through every step."""
    ends = [math.ceil(remaining / pace) + LAG for _, remaining, pace, _ in members]
    peak = 0
    for now in range(max(ends, default=0) + 1):
        own, shared = 0, set()
        for (length, remaining, pace, pages), end in zip(members, ends, strict=True):
            if end >= now:
                positions = length + min(remaining, math.floor(pace * now))
                own += -(-positions // page_size) - len(pages)
                shared.update(pages)
        peak = max(peak, own + len(shared))
    return peak


def batch_of(members: list[Member]) -> Batch:
    columns = [[m[0], m[1], m[2], len(m[3])] for m in members]
    length, remaining, pace, shared = np.array(columns, dtype=float).reshape(-1, 4).T
    return Batch.of(
        length.astype(np.int64), remaining.astype(np.int64)[None], pace, shared.astype(np.int64)
    )


def ends_of_pages(members: list[Member]) -> np.ndarray:
    """By page: when the last of its holders ends; -1 where there is none."""
    ends = np.full(40, -1)
    for (*_, pages), end in zip(members, batch_of(members).end[0], strict=True):
        ends[pages] = np.maximum(ends[pages], end)
    return ends


def some_members(rng: random.Random, count: int, page_size: int) -> list[Member]:
    """Equal lengths, nothing remaining, mixed rates and shared prefixes, all of them often."""
    prefixes = [list(range(start, start + rng.randint(1, 5))) for start in (0, 10, 20)]
    members: list[Member] = []
    for _ in range(count):
        prefix = rng.choice(prefixes)
        pages = prefix[: rng.randint(0, len(prefix))] if rng.random() < 0.5 else []
        length = len(pages) * page_size + rng.randint(0, 30)
        remaining = rng.choice([0, 5, rng.randint(0, 60)])
        members.append((length, remaining, rng.choice([1.0, 1.0, 1.25, 2.0, 3.5, 0.5]), pages))
    return members


@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
def test_peak_is_that_of_a_step_by_step_count(page_size: int) -> None:
    rng = random.Random(page_size)
    for _ in range(1000):
        members = some_members(rng, rng.randint(0, 9), page_size)
        ends = ends_of_pages(members)
        forecast = Forecast(batch_of(members), page_size, ends[None, ends >= 0])
        assert forecast.peak == brute_force(members, page_size)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_asking_and_joining_agree_with_a_new_count(page_size: int) -> None:
    rng = random.Random(100 + page_size)
    for _ in range(300):
        members = some_members(rng, rng.randint(0, 6), page_size)
        ends = ends_of_pages(members)
        forecast = Forecast(batch_of(members), page_size, ends[None, ends >= 0])
        for length, remaining, pace, pages in some_members(rng, 4, page_size):
            held = [page for page in pages if ends[page] >= 0]
            growth = Growth(length, np.array([remaining]), pace, len(held))
            joined = [*members, (length, remaining, pace, held)]
            peak = brute_force(joined, page_size)
            assert forecast.peak_with(growth, ends[None, held]) == peak
            for limit in (peak - 5, peak - 1, peak, peak + 3):
                assert forecast.fits(growth, ends[None, held], limit) == (peak <= limit)
            if rng.random() < 0.7:
                forecast.add(growth, ends[None, held])
                assert forecast.peak == peak
                ends[held] = np.maximum(ends[held], growth.end)
                members = joined


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("futures", [2, 8])
def test_the_peak_of_several_futures_is_the_mean_of_theirs(futures: int, page_size: int) -> None:
    """They differ in what is to come; when one of them joins or is asked about, too."""
    rng = random.Random(futures + page_size)

    def more(member: Member) -> list[Member]:
        length, _, pace, pages = member
        return [(length, rng.choice([0, 7, rng.randint(0, 60)]), pace, pages) for _ in told]

    def growth_of(variants: list[Member]) -> Growth:
        (length, _, pace, pages), *_ = variants
        return Growth(length, np.array([v[1] for v in variants]), pace, len(pages))

    told = range(futures)
    for _ in range(100):
        drawn = [more(member) for member in some_members(rng, rng.randint(1, 8), page_size)]
        worlds = [[variants[k] for variants in drawn] for k in told]
        batches = [batch_of(world) for world in worlds]
        remaining = np.concatenate([batch.remaining for batch in batches])
        first = batches[0]
        batch = Batch.of(first.length, remaining, first.pace, first.shared)
        ends = np.array([ends_of_pages(world) for world in worlds])
        forecast = Forecast(batch, page_size, ends[:, ends[0] >= 0])
        peaks = [brute_force(world, page_size) for world in worlds]
        assert forecast.peak == math.ceil(sum(peaks) / futures)
        for length, _, pace, pages in some_members(rng, 3, page_size):
            held = [page for page in pages if ends[0, page] >= 0]
            variants = more((length, 0, pace, held))
            worlds = [[*world, variant] for world, variant in zip(worlds, variants, strict=True)]
            growth, held_ends = growth_of(variants), ends[:, held]
            peak = math.ceil(sum(brute_force(world, page_size) for world in worlds) / futures)
            assert forecast.peak_with(growth, held_ends) == peak
            for limit in (peak - 5, peak - 1, peak, peak + 3):
                assert forecast.fits(growth, held_ends, limit) == (peak <= limit)
            forecast.add(growth, held_ends)
            assert forecast.peak == peak
            ends[:, held] = np.maximum(held_ends, growth.end[:, None])


def test_an_empty_batch_holds_nothing() -> None:
    forecast = Forecast(batch_of([]), 16)
    assert forecast.peak == 0
    assert forecast.peak_with(Growth(17, np.array([15]), 1.0, 0)) == 2
