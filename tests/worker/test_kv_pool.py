"""Pages on their way between the pool and host memory."""

from __future__ import annotations

import torch

from scheduler.plan import PageCopy
from worker.kv_pool import allocate_host_pool, copy_halves, copy_pages


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
