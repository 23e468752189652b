"""Pages that are halves of pages, against the coarse reading of the pages they were."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.kv.codec import Affine
from kernels.kv.paged import Paged
from kernels.kv.presets import PRESETS, LayerPages
from tests.kernels.batches import Rows, demote


def paged(heads: int, page_size: int, dim: int, *, halves: bool) -> Paged:
    return PRESETS["int8n"].form(LayerPages(heads, page_size, dim, halves=halves))


@pytest.mark.parametrize("seed", range(12))
def test_a_half_is_read_as_its_page_was_read_coarsely(seed: int) -> None:
    rng = random.Random(seed)
    shape = rng.choice([1, 2, 3]), rng.choice([4, 8, 16]), rng.choice([16, 64, 96, 128])
    heads, page_size, dim = shape
    plain, halved = paged(*shape, halves=False), paged(*shape, halves=True)
    g = torch.Generator().manual_seed(seed)
    lengths = [rng.randint(1, 8 * page_size) for _ in range(3)]
    rows = Rows.shuffled(lengths, page_size, g)
    batch = rows.step([(row, 0, length) for row, length in enumerate(lengths)])
    k, v = torch.randn(2, sum(lengths), heads, dim, generator=g)
    pools = []
    for form in (plain, halved):
        pool = torch.zeros(rows.num_pages, form.layout.bytes, dtype=torch.uint8)
        form.append(k, v, pool, batch.kv_slots)
        pools.append(pool)
    pages = rows.page_table.long()
    fine, coarse = plain.read(pools[0], pages), plain.read(pools[0], pages, coarse=True)
    assert all(map(torch.equal, halved.gather(pools[1], pages), fine)), "while all are whole"

    kv, entries = demote(pools[1], pages, rng.choice([0.3, 1.0]), rng)
    rough = (entries < 0).repeat_interleave(page_size, 1)[:, None, :, None]
    mixed = [torch.where(rough, c, f) for c, f in zip(coarse, fine, strict=True)]
    assert all(map(torch.equal, halved.gather(kv, entries), mixed))
    assert all(map(torch.equal, halved.coarse().gather(kv, entries), coarse))


def test_what_room_for_more_numbers_costs() -> None:
    plain, halved = paged(8, 16, 128, halves=False), paged(8, 16, 128, halves=True)
    assert halved.layout.bytes == 2 * halved.layout.half_bytes
    assert halved.layout.bytes / plain.layout.bytes == pytest.approx(1.03, abs=0.001)
    assert halved.name != plain.name


@pytest.mark.parametrize("codecs", [(Affine(8), Affine(4)), (Affine(4), Affine(4))])
def test_only_two_halves_are_halves(codecs: tuple[Affine, Affine]) -> None:
    with pytest.raises(ValueError, match="two halves"):
        Paged(2, 16, 64, *codecs, rotated=True, halves=True)
