"""The kernels benchmark times what it says."""

from __future__ import annotations

import os
import time

import pytest
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


def test_every_triton_kernel_that_is_checked_is_compiled_too() -> None:
    """By the names that both know it by; the small operations are also run."""
    pytest.importorskip("triton")
    from benchmarks.kernels_triton import all_cases, mend, penalties, pointwise, sampling, small
    from kernels.aot_jobs import jobs

    cpu = torch.device("cpu")
    compiled = {job.name for job in jobs()}
    cases = list(all_cases(small, 2, 20, torch.float32, cpu))
    assert {case.compiled for case in cases} <= compiled
    assert len({case.name for case in cases}) == len(cases)
    if os.environ.get("TRITON_INTERPRET") == "1":
        mend()
        for case in (
            *pointwise(small, 2, torch.float32, cpu),
            *sampling(small, 2, cpu),
            penalties(small, 2, 20, cpu),
        ):
            assert (case.ours() - case.theirs()).abs().max() <= case.within


def test_bytes_of_an_element_are_those_of_its_format() -> None:
    """Eight bits and a 16-bit scale and zero for each head of 128; and dense ones of 16 bits."""
    pytest.importorskip("triton")
    from benchmarks.kernels_triton import element_bytes, large
    from kernels.kv.presets import layer_formats

    def of(name: str) -> float:
        form = layer_formats(name, 1, large.kv_heads, page_size, large.head_dim)[0]
        return element_bytes(form, large, torch.bfloat16)

    assert of("auto") == 2
    assert of("int8n") == 1 + 4 / 128
    assert of("int4h") == 0.5 + 4 / 128
