"""The Triton kernels over pages that are sealed against the torch forms: on a GPU, or
interpreted."""

from __future__ import annotations

import os
import random

import pytest
import torch
from torch import Tensor

from kernels.attention.paged import attend_reference
from kernels.kv.format import dense_rows
from kernels.kv.sealed import Sealed
from kernels.kv.windows import Windows
from kernels.ops import AttentionBatch, AttentionLayer
from tests.kernels.batches import Rows, moved

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

from kernels.interpreter import mend
from kernels.torch_ops import TorchOps
from kernels.triton_ops import SealedPages, TritonOps

mend()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITHIN = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Case:
    """A layer, and pages that may be filled."""

    def __init__(
        self,
        lengths: list[int],
        windows: Windows,
        *,
        kv_heads: int = 2,
        group: int = 2,
        head_dim: int = 64,
        page_size: int = 32,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype
        sizes = (kv_heads, page_size, head_dim)
        mean = torch.randn(kv_heads, head_dim, generator=self.generator)
        self.form = Sealed(*sizes, windows, key_mean=mean)
        self.layer = AttentionLayer(
            *(kv_heads * group, kv_heads, head_dim, head_dim**-0.5, None),
            window=window,
            kv=self.form,
        )
        self.rows = Rows.shuffled(lengths, page_size, self.generator)
        behind = dense_rows(self.form, self.rows.num_pages, *sizes, dtype)
        # Whatever was there before: scales that are NaN among it.
        shape = (self.rows.num_pages + behind, *self.form.page_shape(*sizes))
        self.kv = torch.full(shape, 255, dtype=torch.uint8, device=DEVICE)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(DEVICE, self.dtype)

    def keys_and_values(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Side by side, so that tokens lie further apart than heads."""
        heads = self.layer.num_kv_heads
        wide = self.random(tokens, 2 * heads, self.layer.head_dim)
        return wide[:, :heads], wide[:, heads:]

    def step(self, spans: list[tuple[int, int, int]]) -> AttentionBatch:
        return moved(self.rows.step(spans), DEVICE)

    def fill(self, lengths: list[int]) -> None:
        batch = self.step([(row, 0, length) for row, length in enumerate(lengths)])
        k, v = self.keys_and_values(sum(lengths))
        self.form.append(k, v, self.kv, batch.kv_slots, batch.copies)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "page_size"), [(128, 32), (64, 64)])
def test_pages_are_sealed_with_the_bytes_of_the_torch_form(
    head_dim: int, page_size: int, dtype: torch.dtype
) -> None:
    """Full ones, in a chunk, by a token, and once more after a draft; those begun are not."""
    lengths = [2 * page_size + 5, page_size, 7]
    case = Case(lengths, Windows(5, page_size), head_dim=head_dim, page_size=page_size, dtype=dtype)
    expected, found = case.kv.clone(), case.kv.clone()
    for spans in (
        [(0, 0, 2 * page_size + 5), (1, 0, page_size - 1), (2, 0, 7)],
        [(1, page_size - 1, page_size)],
        [(0, 2 * page_size - 1, 2 * page_size + 2), (1, page_size - 2, page_size)],
    ):
        batch = case.step(spans)
        k, v = case.keys_and_values(len(batch.positions))
        k[0], v[-1] = 0.0, 0.0
        TorchOps().append(k, v, case.layer, expected, batch)
        pages = TritonOps().pages(case.layer)
        assert isinstance(pages, SealedPages)
        pages.append(k, v, case.layer, found, batch)
        assert torch.equal(found, expected)
    begun = int(case.rows.page_table[2, 0])
    assert (found[begun] == 255).all()
    assert (found[0] == 255).all()


def test_the_null_page_is_not_sealed() -> None:
    """Where what is only written dense goes: the first tokens of a prefix that came packed."""
    case = Case([70], Windows(40, 32))
    batch = case.step([(0, 0, 40)])
    batch.kv_slots.fill_(31)
    k, v = case.keys_and_values(40)
    expected, found = case.kv.clone(), case.kv.clone()
    TorchOps().append(k, v, case.layer, expected, batch)
    TritonOps().append(k, v, case.layer, found, batch)
    assert torch.equal(found, expected)
    assert (found[0] == 255).all()


@pytest.mark.parametrize("seed", range(5))
def test_random_steps(seed: int) -> None:
    """Sinks, blocks and sliding windows of all sorts, rows over the ends of blocks. Where no row
    may read dense, the table names a page that holds no numbers."""
    rng = random.Random(seed)
    page_size = rng.choice([32, 32, 64])
    windows = Windows(rng.choice([0, 5, 64, 100]), rng.choice([1, 2, 4]) * page_size)
    lengths = [rng.choice([1, 32, 130, rng.randint(1, 200)]) for _ in range(rng.randint(1, 3))]
    case = Case(
        lengths,
        windows,
        kv_heads=rng.choice([1, 2]),
        group=rng.choice([1, 2, 4]),
        head_dim=rng.choice([64, 128]),
        page_size=page_size,
        window=rng.choice([None, None, 7, 70]),
        dtype=rng.choice(DTYPES),
        seed=seed,
    )
    case.fill(lengths)
    spans = [(row, max(n - rng.choice([1, 1, 5, 70]), 0), n) for row, n in enumerate(lengths)]
    rng.shuffle(spans)
    batch = case.step(spans)
    assert batch.copies is not None
    for row, (_, start, stop) in enumerate(spans):  # as `WindowPages` keeps them
        held = [*range(min(windows.sink, stop)), *range(windows.begin(start), stop)]
        pages = {at // page_size for at in held}
        gone = [i for i in range(batch.copies.table.shape[1]) if i not in pages]
        batch.copies.table[row, gone] = 0
    # The reference multiplies all that is there, pages that are not sealed and the null page.
    clean = case.kv.clone()
    clean[(clean == 255).all(1)] = 0
    case.form.dense(clean, batch.copies.count, case.dtype)[0] = 0.0
    case.form.dense(case.kv, batch.copies.count, case.dtype)[0] = torch.nan
    q = case.random(len(batch.positions), case.layer.num_heads, case.layer.head_dim)
    expected = attend_reference(q, clean, case.layer, batch)
    assert expected.isfinite().all()
    found = TritonOps().attend(q, case.kv, case.layer, batch)
    within = WITHIN[case.dtype]
    torch.testing.assert_close(found, expected, atol=within, rtol=within)


def test_what_it_does_not_take() -> None:
    def taken(page_size: int, head_dim: int) -> bool:
        form = Sealed(1, page_size, head_dim, Windows(0, page_size))
        layer = AttentionLayer(2, 1, head_dim, 1.0, None, kv=form)
        return isinstance(TritonOps().pages(layer), SealedPages)

    assert taken(32, 64)
    assert taken(64, 128)
    assert not taken(96, 128)
    assert not taken(128, 128)
    assert not taken(32, 256)
    assert not taken(32, 32)
