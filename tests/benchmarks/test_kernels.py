"""The kernels benchmark times what it says."""

from __future__ import annotations

import time

import torch

from benchmarks.kernels import Pair, compare, decode_step, page_size


def test_compare_reports_microseconds_and_the_ratio_of_torch_to_native() -> None:
    pair = Pair("sleep", 1, torch=lambda: time.sleep(0.008), native=lambda: time.sleep(0.002))
    ours, theirs, ratio, low, high = compare(pair, 3)
    assert 2000 <= ours < theirs
    assert low <= ratio <= high
    assert ratio > 1


def test_a_decode_step_fills_each_row_to_its_context() -> None:
    batch, pages = decode_step(3, 40)
    assert batch.positions.tolist() == [40] * 3
    used = batch.page_table.flatten().tolist()
    assert sorted(used) == list(range(1, pages))
    for row in range(3):
        page, offset = divmod(int(batch.kv_slots[row]), page_size)
        assert (page, offset) == (int(batch.page_table[row, 40 // page_size]), 40 % page_size)
    assert torch.equal(batch.kv_lengths, batch.positions.int() + 1)
