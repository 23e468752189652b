"""The Triton kernels over pages of eight-bit floats against the torch forms: on a GPU, or
interpreted."""

from __future__ import annotations

import dataclasses
import os
import random

import pytest
import torch
from torch import Tensor

from kernels.attention.paged import attend_reference
from kernels.kv.format import dense_rows
from kernels.kv.paged import Paged
from kernels.kv.presets import PRESETS, LayerPages
from kernels.kv.scales import HeadScales
from kernels.kv.windows import Windows
from kernels.ops import AttentionBatch, AttentionLayer
from tests.kernels.batches import Rows, moved

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

from kernels.attention import dense_triton
from kernels.interpreter import mend
from kernels.triton_ops import FloatPages, TritonOps

mend()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITHIN = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

if not dense_triton.reads_floats():
    pytest.skip("this GPU has no eight-bit floats", allow_module_level=True)


@dataclasses.dataclass
class Case:
    """A layer with filled pages, whose heads are of all sizes if they have scales."""

    layer: AttentionLayer
    rows: Rows
    kv: Tensor  # [pages, bytes] uint8
    generator: torch.Generator
    dtype: torch.dtype
    sizes: Tensor  # [2, kv_heads, 1], of numbers of each head's keys and values

    @classmethod
    def make(
        cls,
        lengths: list[int],
        *,
        kv_heads: int = 2,
        group: int = 2,
        head_dim: int = 64,
        page_size: int = 16,
        window: int | None = None,
        dense: Windows | None = None,
        scaled: bool = True,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)
        exponents = torch.zeros(2, kv_heads, dtype=torch.int64)
        if scaled:
            exponents = torch.randint(-9, 4, (2, kv_heads), generator=generator)
        pages = LayerPages(
            *(kv_heads, page_size, head_dim),
            key_mean=torch.randn(kv_heads, head_dim, generator=generator)
            * exponents[0, :, None].exp2(),
            windows=dense,
            scales=HeadScales(exponents[0], exponents[1]) if scaled else None,
        )
        paged = PRESETS["fp8"].form(pages)
        rows = Rows.shuffled(lengths, page_size, generator)
        behind = dense_rows(paged, rows.num_pages, kv_heads, page_size, head_dim, dtype)
        # Whatever was there before: all of it is NaN.
        shape = (rows.num_pages + behind, paged.layout.bytes)
        kv = torch.full(shape, 255, dtype=torch.uint8, device=DEVICE)
        heads = kv_heads * group
        layer = AttentionLayer(
            heads, kv_heads, head_dim, head_dim**-0.5, None, window=window, kv=paged
        )
        sizes = exponents.float().exp2()[..., None].to(DEVICE)
        case = cls(layer, rows, kv, generator, dtype, sizes)
        batch = case.step([(row, 0, length) for row, length in enumerate(lengths)])
        k, v = case.keys_and_values(sum(lengths))
        paged.append(k, v, kv, batch.kv_slots, batch.copies)
        return case

    @property
    def form(self) -> Paged:
        assert isinstance(self.layer.kv, Paged)
        return self.layer.kv

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(DEVICE)

    def keys_and_values(self, tokens: int) -> tuple[Tensor, Tensor]:
        shape = (tokens, self.layer.num_kv_heads, self.layer.head_dim)
        k, v = (self.random(*shape) * size for size in self.sizes)
        return k.to(self.dtype), v.to(self.dtype)

    def queries(self, batch: AttentionBatch) -> Tensor:
        """Whose scores are of one size whatever their head's keys are."""
        layer = self.layer
        q = self.random(len(batch.positions), layer.num_heads, layer.head_dim)
        group = layer.num_heads // layer.num_kv_heads
        return (q / self.sizes[0].repeat_interleave(group, 0)).to(self.dtype)

    def step(self, spans: list[tuple[int, int, int]]) -> AttentionBatch:
        return moved(self.rows.step(spans), DEVICE)

    def attend(self, q: Tensor, batch: AttentionBatch, length: int | None = None) -> Tensor:
        """As fp32, of values of one size."""
        out = dense_triton.attend_floats(q, self.kv, self.layer, batch, length)
        assert out.dtype == self.dtype
        return self.even(out)

    def even(self, out: Tensor) -> Tensor:
        group = self.layer.num_heads // self.layer.num_kv_heads
        return out.float() / self.sizes[1].repeat_interleave(group, 0)

    def check(self, batch: AttentionBatch, length: int | None = None) -> None:
        q, kv = self.queries(batch), self.kv.clone()
        if self.form.windows is not None:  # the reference multiplies the null page
            assert batch.copies is not None
            self.form.dense(kv, batch.copies.count, self.dtype)[0] = 0.0
        expected = self.even(attend_reference(q, kv, self.layer, batch))
        within = WITHIN[self.dtype]
        found = self.attend(q, batch, length)
        torch.testing.assert_close(found, expected, atol=within, rtol=within)


@pytest.mark.parametrize(
    ("scaled", "dtype"), [(False, torch.float32), (True, torch.bfloat16), (True, torch.float16)]
)
def test_decoding_drafts_and_a_chunk(scaled: bool, dtype: torch.dtype) -> None:
    case = Case.make([33, 130, 17], head_dim=128, scaled=scaled, dtype=dtype)
    case.check(case.step([(0, 32, 33), (1, 126, 130), (2, 16, 17)]), 64)
    case.check(case.step([(1, 110, 130), (0, 32, 33)]))


@pytest.mark.parametrize("seed", range(5))
def test_random_steps(seed: int) -> None:
    """Lengths about pages' ends, any groups, page sizes, heads and sliding windows."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 16, 24, 64])
    lengths = [
        rng.choice([1, page_size, page_size + 1, rng.randint(1, 150)])
        for _ in range(rng.randint(1, 4))
    ]
    case = Case.make(
        lengths,
        kv_heads=rng.choice([1, 2]),
        group=rng.choice([1, 3, 4]),
        page_size=page_size,
        head_dim=rng.choice([16, 64, 80]),
        window=rng.choice([None, 1, 7, 70]),
        scaled=rng.choice([False, True]),
        dtype=rng.choice(DTYPES),
        seed=seed,
    )
    spans = [(row, max(n - rng.choice([1, 1, 3, 20]), 0), n) for row, n in enumerate(lengths)]
    rng.shuffle(spans)
    case.check(case.step(spans), rng.choice([64, 128, None]))


@pytest.mark.parametrize("seed", range(5))
def test_random_windows(seed: int) -> None:
    """Sinks and blocks beside the floats, whose scales the dense copies have not. Where no row may
    read dense, the table names a page that holds no numbers."""
    rng = random.Random(seed)
    page_size = rng.choice([16, 32])
    windows = Windows(rng.choice([0, 5, 64, 100]), rng.choice([0, 1, 2, 4]) * page_size)
    lengths = [rng.choice([1, 16, 130, rng.randint(1, 300)]) for _ in range(rng.randint(1, 3))]
    case = Case.make(
        lengths,
        kv_heads=rng.choice([1, 2]),
        group=rng.choice([1, 2, 4]),
        page_size=page_size,
        window=rng.choice([None, None, 7, 70]),
        dense=windows,
        scaled=rng.choice([False, True, True]),
        dtype=rng.choice(DTYPES),
        seed=seed,
    )
    spans = [(row, max(n - rng.choice([1, 1, 5, 70]), 0), n) for row, n in enumerate(lengths)]
    rng.shuffle(spans)
    batch = case.step(spans)
    assert batch.copies is not None
    for row, (_, start, stop) in enumerate(spans):  # as `WindowPages` keeps them
        held = [*range(min(windows.sink, stop)), *range(windows.begin(start), stop)]
        held += range(start, stop)
        pages = {at // page_size for at in held}
        gone = [i for i in range(batch.copies.table.shape[1]) if i not in pages]
        batch.copies.table[row, gone] = 0
    case.form.dense(case.kv, batch.copies.count, case.dtype)[0] = torch.nan
    case.check(batch, rng.choice([64, 128, None]))


@pytest.mark.parametrize("dense", [None, Windows(20, 32)])
def test_a_chunk_is_its_parts(dense: Windows | None) -> None:
    case = Case.make([80], kv_heads=1, group=4, dense=dense)
    q = case.queries(case.step([(0, 20, 80)]))
    whole = case.attend(q, case.step([(0, 20, 80)]), 64)
    parts = [(20, 60), (60, 61), (61, 66), (66, 80)]
    found = [case.attend(q[a - 20 : b - 20], case.step([(0, a, b)]), 64) for a, b in parts]
    torch.testing.assert_close(torch.cat(found), whole, atol=1e-5, rtol=1e-5)


def test_bounds_larger_than_the_step() -> None:
    """As in a captured graph, with rows on the null page, which holds NaNs."""
    case = Case.make([30, 100])
    exact = case.step([(0, 29, 30), (1, 97, 100)])
    table = torch.zeros(3, 32, dtype=torch.int32, device=DEVICE)
    table[:2, : exact.page_table.shape[1]] = exact.page_table
    padded = dataclasses.replace(
        exact,
        positions=torch.cat([exact.positions, exact.positions.new_zeros(2)]),
        query_starts=torch.tensor([0, 1, 4, 6], dtype=torch.int32, device=DEVICE),
        kv_lengths=torch.tensor([30, 100, 1], dtype=torch.int32, device=DEVICE),
        page_table=table,
        max_query=4,
        max_kv=512,
    )
    q = case.queries(padded)
    expected = case.even(attend_reference(q[:4], case.kv, case.layer, exact))
    found = case.attend(q, padded)[:4]
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", [None, Windows(8, 16)])
@pytest.mark.parametrize("scaled", [False, True])
def test_append_writes_the_bytes_of_the_torch_form(
    scaled: bool, dense: Windows | None, dtype: torch.dtype
) -> None:
    case = Case.make([21, 30], head_dim=128, dense=dense, scaled=scaled, dtype=dtype)
    pages = TritonOps().pages(case.layer)
    assert isinstance(pages, FloatPages)
    batch = case.step([(0, 3, 21), (1, 29, 30)])
    # Keys and values as they come: side by side, so that tokens lie further apart than heads.
    wide = (case.random(19, 6, 128) * case.sizes.flatten().repeat(2)[:6, None]).to(dtype)
    wide[0] = 0.0
    wide[1] *= 1e4
    wide[2] *= 1e-4
    wide[3] = torch.inf
    # What the floats are, and what lies halfway between them.
    held = torch.arange(126, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).float()
    wide[4, 4:, :126] = held
    wide[5, 4:, :125] = -(held[1:] + held[:-1]) / 2
    k, v = wide[:, 2:4], wide[:, 4:]
    expected, found = case.kv.clone(), case.kv.clone()
    case.form.append(k, v, expected, batch.kv_slots, batch.copies)
    pages.append(k, v, case.layer, found, batch)
    assert torch.equal(found, expected)
    assert not torch.equal(found, case.kv)


def test_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(head_dim: int) -> bool:
        form = PRESETS["fp8"].form(LayerPages(1, 16, head_dim))
        layer = AttentionLayer(2, 1, head_dim, 1.0, None, kv=form)
        return isinstance(TritonOps().pages(layer), FloatPages)

    assert [taken(head_dim) for head_dim in (8, 16, 96, 256, 512)] == [
        False,
        True,
        False,
        True,
        False,
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, right in (((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert taken(64) is right
