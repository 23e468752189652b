"""Scales of heads for eight-bit floats, against all the numbers there are, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.kv.codec import Affine
from kernels.kv.paged import Paged
from kernels.kv.scales import HEADROOM, MOST, HeadScales, scale_exponents
from kernels.kv.table import Float8
from kernels.kv.windows import DensePages, Windows

SEEDS = pytest.mark.parametrize("seed", range(12))
RELATIVE = 2.0**-4  # half the distance of neighbours over the lower one, three mantissa bits


def floats() -> Tensor:
    """All finite e4m3 numbers, in order, fp64. Neither infinities nor other NaNs than two exist."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return codes[codes.isfinite()].unique()


@dataclass(frozen=True, slots=True)
class Case:
    """k, v: [tokens, kv_heads, head_dim], of heads between 1e-3 and 1e4."""

    k: Tensor
    v: Tensor
    page_size: int
    mean: Tensor  # [kv_heads, head_dim]
    slots: Tensor  # [tokens] of shuffled pages
    scales: HeadScales

    @classmethod
    def of(cls, seed: int) -> Case:
        g = torch.Generator().manual_seed(seed)

        def draw(least: int, most: int) -> int:
            return int(torch.randint(least, most + 1, (1,), generator=g))

        tokens, heads, dim, page_size = draw(1, 40), draw(2, 6), 8 * draw(1, 16), draw(1, 9)
        sizes = 10.0 ** (7 * torch.rand(2, heads, 1, generator=g) - 3)
        sizes[0, 0], sizes[0, 1], sizes[1, 0], sizes[1, 1] = 1e-3, 1e4, 1e4, 1e-3
        k, v = torch.randn(2, tokens, heads, dim, generator=g) * sizes[:, None]
        mean = torch.randn(heads, dim, generator=g) * sizes[0]
        order = torch.randperm(-(-tokens // page_size), generator=g)
        slots = (order[:, None] * page_size + torch.arange(page_size)).flatten()[:tokens]
        largest = torch.stack([(k - mean).abs().amax((0, 2)), v.abs().amax((0, 2))])
        return cls(k, v, page_size, mean, slots, HeadScales(*scale_exponents(largest)))

    def paged(self, scales: HeadScales | None, windows: Windows | None = None) -> Paged:
        _, heads, dim = self.k.shape
        form = (heads, self.page_size, dim, Float8(), Float8())
        return Paged(*form, rotated=False, key_mean=self.mean, windows=windows, scales=scales)

    def pool(self, form: Paged, chunk: int | None = None) -> Tensor:
        """Appended in chunks, by default all at once."""
        tokens, heads, dim = self.k.shape
        pages = -(-tokens // self.page_size)
        kv = torch.zeros(pages, *form.page_shape(heads, self.page_size, dim), dtype=torch.uint8)
        for part in torch.arange(tokens).split(chunk or tokens):
            form.append(self.k[part], self.v[part], kv, self.slots[part])
        return kv

    def stored(self, form: Paged, kv: Tensor) -> tuple[Tensor, Tensor]:
        """As k and v, keys less their mean."""
        pages = (self.slots[:: self.page_size] // self.page_size)[None]
        keys, values = form.gather(kv, pages)
        return keys[0].transpose(0, 1)[: len(self.k)], values[0].transpose(0, 1)[: len(self.k)]


@SEEDS
def test_heads_of_all_sizes_keep_the_relative_error_of_the_floats(seed: int) -> None:
    case = Case.of(seed)
    form = case.paged(case.scales)
    found = case.stored(form, case.pool(form))
    for right, got, exponents in zip(
        (case.k - case.mean, case.v), found, (case.scales.keys, case.scales.values), strict=True
    ):
        scale = exponents.double().exp2()[:, None]
        exact, numbers = right.double() / scale, floats()
        nearest = (exact[..., None] - numbers).abs().amin(-1)
        error = (got.double() / scale - exact).abs()
        assert torch.equal(error, nearest), "nothing is rounded but to the nearest of the floats"
        assert exact.abs().max() <= numbers.max() / HEADROOM
        normal = exact.abs() >= 2.0**-6
        assert bool((error[normal] <= RELATIVE * exact.abs()[normal]).all())
        assert bool((error[~normal] <= 2.0**-10).all())


@SEEDS
def test_without_scales_large_heads_saturate_and_small_ones_lose_bits(seed: int) -> None:
    case = Case.of(seed)
    form = case.paged(None)
    keys, values = case.stored(form, case.pool(form))
    for right, got, small, large in ((case.k - case.mean, keys, 0, 1), (case.v, values, 1, 0)):
        lost = (right - got).double().square().sum((0, 2))
        share = lost / right.double().square().sum((0, 2))
        assert got[:, large].abs().max() == 448.0
        assert share[large] > 0.5
        assert share[small] > 0.05


@SEEDS
def test_codes_are_the_same_by_token_or_by_chunk(seed: int) -> None:
    case = Case.of(seed)
    form = case.paged(case.scales)
    whole = case.pool(form)
    assert torch.equal(case.pool(form, 1), whole)
    assert torch.equal(case.pool(form, 7), whole)


@SEEDS
def test_a_part_of_the_heads_has_their_codes(seed: int) -> None:
    """What a rank of tensor parallelism keeps is what one device keeps of its heads."""
    case = Case.of(seed)
    heads = case.k.shape[1] // 2 * 2
    both = HeadScales(case.scales.keys[:heads], case.scales.values[:heads])
    form = case.paged(case.scales)
    whole = case.stored(form, case.pool(form))
    for i in range(2):
        mine = slice(i * heads // 2, (i + 1) * heads // 2)
        k, v, mean = case.k[:, mine], case.v[:, mine], case.mean[mine]
        part = Case(k, v, case.page_size, mean, case.slots, both.part(i, 2))
        own = part.paged(part.scales)
        for found, expected in zip(part.stored(own, part.pool(own)), whole, strict=True):
            assert torch.equal(found, expected[:, mine])


def test_scales_are_in_the_name() -> None:
    case = Case.of(0)
    keys, values = case.scales.keys, case.scales.values
    changed = keys.clone()
    changed[-1] += 1
    scales = (None, case.scales, HeadScales(changed, values), HeadScales(values, keys))
    assert len({case.paged(some).name for some in scales}) == 4
    same = HeadScales(keys.clone(), values.clone())
    assert case.paged(same).name == case.paged(case.scales).name


def test_dense_copies_have_no_scales() -> None:
    case = Case.of(1)
    tokens, heads, dim = case.k.shape
    form = case.paged(case.scales, Windows(tokens, 0))
    pages = -(-tokens // case.page_size)
    behind = -(-pages * 2 * heads * case.page_size * dim * 4 // form.layout.bytes)
    kv = torch.zeros(pages + behind, form.layout.bytes, dtype=torch.uint8)
    table = torch.arange(pages, dtype=torch.int32)[None]
    slots = torch.arange(tokens)
    form.append(case.k, case.v, kv, case.slots, DensePages(table, slots, pages))
    copies = form.dense(kv, pages, torch.float32).transpose(2, 3).transpose(0, 1).flatten(1, 2)
    assert torch.equal(copies[0, :tokens], case.k - case.mean)
    assert torch.equal(copies[1, :tokens], case.v)
    alone = case.paged(case.scales)
    assert torch.equal(kv[:pages], case.pool(alone))


def test_codes_with_scales_of_their_own_take_none() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    for codec in (Affine(4), Affine(8)):
        with pytest.raises(ValueError, match="scales of their own"):
            Paged(1, 16, 64, codec, codec, rotated=True, scales=HeadScales(one, one))


@given(st.floats(2.0**-50, 2.0**60))
def test_the_smallest_scale_with_room(largest: float) -> None:
    exponent = int(scale_exponents(torch.tensor(largest, dtype=torch.float64)))
    room = HEADROOM * largest
    assert room <= 448 * 2.0**exponent < 2 * room


def test_scales_at_the_ends() -> None:
    largest = torch.tensor([0.0, 1e-30, 1e30, 224.0, 224.001, 112.0])
    assert scale_exponents(largest).tolist() == [0, -MOST, MOST, 0, 1, -1]
