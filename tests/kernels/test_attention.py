"""`kernels.attention.paged` against its specification, and the specification against SDPA."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention.paged import TILE, attend_reference
from kernels.kv.format import Dense
from kernels.ops import AttentionLayer
from kernels.torch_ops import TorchOps
from tests.kernels.batches import Rows

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def layer(heads: int, kv_heads: int, head_dim: int, window: int | None = None) -> AttentionLayer:
    return AttentionLayer(heads, kv_heads, head_dim, head_dim**-0.5, None, window=window)


def pool(rows: Rows, shape: AttentionLayer, dtype: torch.dtype, g: torch.Generator):
    """Keys and values for every page. The pages nobody owns hold numbers like any other."""
    size = (rows.num_pages, 2, shape.num_kv_heads, rows.page_size, shape.head_dim)
    return torch.randn(size, generator=g).to(dtype)


def test_reference_is_causal_attention() -> None:
    """One whole prompt on pages in their order is what torch calls causal attention."""
    g = torch.Generator().manual_seed(0)
    shape, length = layer(4, 2, 16), 40
    rows = Rows(8, torch.arange(1, 6, dtype=torch.int32)[None])
    kv = pool(rows, shape, torch.float32, g)
    q = torch.randn(length, 4, 16, generator=g)
    keys, values = kv[1:].permute(1, 2, 0, 3, 4).flatten(2, 3).repeat_interleave(2, dim=1)
    expected = F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, is_causal=True)
    found = attend_reference(q, kv, shape, rows.step([(0, 0, length)]))
    torch.testing.assert_close(found, expected.transpose(0, 1))


@st.composite
def ragged_steps(draw):
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        query = draw(st.one_of(st.integers(1, 4), st.integers(1, 200)))
        rows.append((draw(st.integers(0, 700)), query))
    return rows


@settings(max_examples=25, deadline=None)
@given(
    spans=ragged_steps(),
    page_size=st.sampled_from([1, 8, 16, 48]),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (4, 4)]),
    window=st.sampled_from([None, 1, 7, 100, 400]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_matches_the_reference(spans, page_size, heads, window, dtype, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    shape = layer(*heads, 16, window)
    rows = Rows.shuffled([start + query for start, query in spans], page_size, g)
    batch = rows.step([(i, start, start + n) for i, (start, n) in enumerate(spans)])
    kv = pool(rows, shape, dtype, g)
    q = torch.randn(len(batch.positions), heads[0], 16, generator=g).to(dtype)
    expected = attend_reference(q, kv, shape, batch)
    found = TorchOps().attend(q, kv, shape, batch)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_models_may_share_a_step(dtype: torch.dtype) -> None:
    """A draft model runs under the target's batch with its own number of KV heads."""
    g = torch.Generator().manual_seed(3)
    rows = Rows.shuffled([30, 50], 16, g)
    batch, ops = rows.step([(0, 29, 30), (1, 49, 50)]), TorchOps()
    for kv_heads in (2, 1, 2):
        shape = layer(4, kv_heads, 16)
        kv = pool(rows, shape, dtype, g)
        q = torch.randn(2, 4, 16, generator=g).to(dtype)
        found = ops.attend(q, kv, shape, batch)
        expected = attend_reference(q, kv, shape, batch)
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("heads", [(4, 1), (8, 2), (3, 3), (2, 2)])
@pytest.mark.parametrize("window", [None, 130])
def test_a_token_does_not_depend_on_its_step(heads: tuple[int, int], window: int | None) -> None:
    """fp32: bitwise the same alone, in a chunk of any size, and beside any neighbours."""
    g = torch.Generator().manual_seed(7)
    shape, length = layer(*heads, 32, window), 400
    rows = Rows.shuffled([length, 500, 40], 16, g)
    kv = pool(rows, shape, torch.float32, g)
    q = torch.randn(length, heads[0], 32, generator=g)
    whole = TorchOps().attend(q, kv, shape, rows.step([(0, 0, length)]))
    assert whole.isfinite().all()
    for size in (1, 3, 17, 100):
        for start in (0, 127, 128, length - size):
            stop = min(start + size, length)
            for before, after in (([], []), ([(1, 100, 101)], [(2, 0, 40)]), ([(1, 0, 500)], [])):
                batch = rows.step([*before, (0, start, stop), *after])
                n = sum(b - a for _, a, b in before)
                m = sum(b - a for _, a, b in after)
                others = torch.randn(n + m, *q.shape[1:], generator=g)
                mixed = torch.cat([others[:n], q[start:stop], others[n:]])
                found = TorchOps().attend(mixed, kv, shape, batch)[n : n + stop - start]
                assert torch.equal(found, whole[start:stop]), (size, start, before)


def test_memory_is_bounded_by_the_tile() -> None:
    """One long chunk among decoding rows is not padded out to every row."""
    seen: list[int] = []

    class Watched(Dense):
        def gather(self, kv: torch.Tensor, pages: torch.Tensor):
            found = super().gather(kv, pages)
            seen.append(found[0].numel())
            return found

    g = torch.Generator().manual_seed(1)
    shape = replace(layer(2, 1, 8), kv=Watched())
    rows = Rows.shuffled([2000] * 32, 16, g)
    kv = pool(rows, shape, torch.float32, g)
    batch = rows.step([(0, 1488, 2000), *((i, 1999, 2000) for i in range(1, 32))])
    q = torch.randn(len(batch.positions), 2, 8, generator=g)
    found = TorchOps().attend(q, kv, shape, batch)
    assert max(seen) <= 31 * TILE * 8 < 32 * 2000 * 8
    torch.testing.assert_close(found, attend_reference(q, kv, shape, batch), atol=2e-6, rtol=2e-6)
