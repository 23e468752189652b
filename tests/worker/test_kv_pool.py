"""Pages on their way between the pool and host memory."""

from __future__ import annotations

import ctypes
import sys
import weakref
from threading import Thread

import pytest
import torch
from torch import Tensor

from scheduler.plan import PageCopy
from tests.e2e.test_exactness import CPU, SPEC
from worker.kv_pool import (
    _populate,
    allocate_host_pool,
    allocate_pool,
    copy_halves,
    copy_pages,
    populate,
)


def test_pages_come_back_bit_for_bit_and_no_other_page_changes() -> None:
    torch.manual_seed(0)
    kv = [torch.randn(6, 2, 3, 4, 8).to(torch.bfloat16) for _ in range(3)]
    before = [layer.clone() for layer in kv]
    host = allocate_host_pool(kv, 4)
    assert [layer.shape for layer in host] == [(4, 2, 3, 4, 8)] * 3
    assert all(layer.dtype == torch.bfloat16 for layer in host)
    copy_pages(kv, host, [PageCopy(5, 1), PageCopy(2, 3)])
    for layer in kv:
        layer[5], layer[2] = 0.0, 0.0
    copy_pages(host, kv, (PageCopy(3, 2), PageCopy(1, 5)))
    for layer, old in zip(kv, before, strict=True):
        assert torch.equal(layer, old)
    copy_pages(host, kv, (PageCopy(1, 4),))
    for layer, old in zip(kv, before, strict=True):
        assert torch.equal(layer[4], old[5])
        assert torch.equal(layer[:4], old[:4])
    assert not any(layer[[0, 2]].any() for layer in host)


def test_pages_of_several_copies_go_one_after_the_other() -> None:
    kv = [torch.arange(4.0).reshape(4, 1, 1, 1, 1)]
    host = allocate_host_pool(kv, 2)
    copy_pages(kv, host, [PageCopy(3, 1), PageCopy(2, 1)])
    assert host[0].flatten().tolist() == [0.0, 2.0]


def test_halves_of_pages_go_to_other_halves() -> None:
    generator = torch.Generator().manual_seed(0)
    kv = [torch.randint(256, (5, 12), dtype=torch.uint8, generator=generator) for _ in range(2)]
    before = [layer.clone() for layer in kv]
    copy_halves(kv, [PageCopy(2 * 3, 2 * 1 + 1), PageCopy(2 * 4, 2 * 2)])
    for layer, old in zip(kv, before, strict=True):
        old[1, 6:], old[2, :6] = old[3, :6], old[4, :6]
        assert torch.equal(layer, old)


def resident(layer: Tensor) -> float:
    """The share of a tensor's memory that the process has from the system."""
    unit = 4096
    start = layer.data_ptr() // unit * unit
    count = -(-(layer.data_ptr() + layer.nbytes - start) // unit)
    seen = (ctypes.c_ubyte * count)()
    assert not ctypes.CDLL(None).mincore(
        ctypes.c_void_p(start), ctypes.c_size_t(count * unit), seen
    )
    return sum(byte & 1 for byte in seen) / count


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_pool_takes_its_memory_before_it_is_written_and_keeps_what_is_in_it() -> None:
    kv = allocate_pool(SPEC, 300, 16, torch.float32, CPU)
    kv[0][7] = 1.5
    assert resident(kv[-1]) < 0.1
    populate(kv).join(30)
    assert all(resident(layer) == 1.0 for layer in kv)
    assert (kv[0][7] == 1.5).all()
    assert not kv[0][:7].any()
    assert not kv[-1].any()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_of_a_pool_that_is_gone_nothing_more_is_taken() -> None:
    kv = allocate_pool(SPEC, 300, 16, torch.float32, CPU)
    layers, last = [weakref.ref(layer) for layer in kv], kv[-1]
    kv.clear()
    thread = Thread(target=_populate, args=(layers,))
    thread.start()
    thread.join(30)
    assert layers[0]() is None
    assert resident(last) < 0.1
