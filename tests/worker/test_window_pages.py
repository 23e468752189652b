"""Dense pages of windows: always enough of them, each with one owner, where they are read."""

from __future__ import annotations

from random import Random

import pytest
import torch

from kernels.kv.windows import Windows
from worker.window_pages import WindowPages, dense_page_count

SLOTS, LENGTH, PAGE, STEP = 7, 640, 8, 96


@pytest.mark.parametrize(("sink", "block"), [(0, 16), (12, 32), (64, 0), (40, 128), (5, 8)])
def test_random_steps_never_run_out(sink: int, block: int) -> None:
    windows, rng = Windows(sink, block), Random(block)
    count = dense_page_count(windows, SLOTS, PAGE, STEP)
    pages = WindowPages(windows, count, SLOTS, LENGTH // PAGE, PAGE, torch.device("cpu"))
    length = [0] * SLOTS
    least = count
    for _ in range(600):
        budget, rows = STEP, []
        for slot in rng.sample(range(SLOTS), rng.randint(1, SLOTS)):
            if length[slot] > LENGTH - STEP:  # another owner, on a cached prefix
                pages.clear(slot)
                length[slot] = block * rng.randint(0, 2) if block else PAGE
                pages.cover(slot, 0, min(sink, length[slot]))
            count_of = min(rng.choice([1, 1, 5, 60]), budget)
            if count_of:
                pages.cover(slot, length[slot], length[slot] + count_of)
                rows.append((slot, count_of))
                budget -= count_of
        least = min(least, pages.free)
        held = pages.table[pages.table > 0].tolist()
        assert len(held) == len(set(held)) == pages.count - 1 - pages.free
        for slot, count_of in rows:
            now = length[slot]
            seen = [*range(min(sink, now)), *range(now, now + count_of)]
            if block:
                seen += range(now // block * block, now)
            assert all(pages.table[slot, at // PAGE] for at in seen)
            length[slot] += rng.choice([count_of, rng.randint(1, count_of)])  # some drafts wrong
            pages.settle(slot, length[slot])
    assert least < count / 2, "room that nobody ever needs"
    for slot in range(SLOTS):
        pages.clear(slot)
    assert pages.free == pages.count - 1
    assert not pages.table.any()


def test_without_windows_there_are_none() -> None:
    assert dense_page_count(None, SLOTS, PAGE, STEP) == 0
