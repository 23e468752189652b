"""NativeOps against the torch specification, and against itself in other batches."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.attention.paged import attend_reference
from kernels.cpu.ops import NativeOps
from kernels.norm import rms_norm_reference
from kernels.torch_ops import TorchOps

from .batches import Shape, make_batch, only

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# One rounding to bf16 apart: relative 2^-8 of the value, and of the summands it cancels from.
TOLERANCE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (1.6e-2, 1e-2)}


def close(found: Tensor, expected: Tensor) -> None:
    rtol, atol = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@DTYPES
@pytest.mark.parametrize("hidden", [1, 16, 37, 320, 1024])
def test_norms_match_the_reference(native: NativeOps, dtype: torch.dtype, hidden: int) -> None:
    g = torch.Generator().manual_seed(hidden)
    x, residual = torch.randn(2, 5, hidden, generator=g).to(dtype)
    weight = torch.randn(hidden, generator=g).to(dtype)
    close(native.rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    expected = residual + x
    out, total = native.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, expected)
    assert total.data_ptr() == residual.data_ptr()
    close(out, rms_norm_reference(expected, weight, 1e-6))


@DTYPES
@pytest.mark.parametrize("width", [1, 16, 200, 640])
def test_silu_mul_matches_the_reference(native: NativeOps, dtype: torch.dtype, width: int) -> None:
    x = (torch.randn(7, 2 * width, generator=torch.Generator().manual_seed(width)) * 4).to(dtype)
    gate, up = x.float().chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up).to(dtype)
    close(native.silu_mul(x), expected)


def test_silu_at_the_ends_of_the_range(native: NativeOps) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, float("nan")])
    found = native.silu_mul(torch.cat([gate, torch.ones(8)])[None])[0]
    torch.testing.assert_close(
        found, torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-6, equal_nan=True
    )


@DTYPES
@pytest.mark.parametrize("norms", [True, False], ids=["qk-norm", "plain"])
@pytest.mark.parametrize(
    ("head_dim", "rotary"), [(128, 128), (128, 64), (80, 40), (16, 16), (8, 0)]
)
def test_rope_append_matches_torch(
    native: NativeOps, dtype: torch.dtype, norms: bool, head_dim: int, rotary: int
) -> None:
    g = torch.Generator().manual_seed(head_dim)
    shape = Shape(heads=6, kv_heads=3, head_dim=head_dim, page_size=8)
    batch, pages = make_batch([(0, 5), (17, 1), (30, 4)], shape.page_size, g)
    angles = torch.randn(64, rotary // 2, generator=g)
    layer = shape.layer(
        torch.stack([angles.cos(), angles.sin()], dim=1) if rotary else None,
        torch.randn(2, head_dim, generator=g).to(dtype) if norms else None,
    )
    qkv = torch.randn(10, 12 * head_dim, generator=g).to(dtype)
    kv = torch.randn(pages, 2, 3, 8, head_dim, generator=g).to(dtype)
    expected_kv, found_kv = kv.clone(), kv.clone()
    expected = TorchOps().rope_append(qkv, layer, expected_kv, batch)
    found = native.rope_append(qkv, layer, found_kv, batch)
    close(found, expected)
    close(found_kv, expected_kv)
    untouched = torch.ones(pages * 8, dtype=torch.bool)
    untouched[batch.kv_slots] = False
    by_slot = lambda t: t.permute(0, 3, 1, 2, 4).flatten(0, 1)[untouched]  # noqa: E731
    assert torch.equal(by_slot(found_kv), by_slot(kv))


@DTYPES
def test_append_takes_strided_tokens(native: NativeOps, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    batch, pages = make_batch([(3, 4), (0, 6)], 4, g)
    layer = Shape(4, 2, 32, 4).layer()
    qkv = torch.randn(10, 6, 32, generator=g).to(dtype)
    found = torch.zeros(pages, 2, 2, 4, 32, dtype=dtype)
    expected = found.clone()
    TorchOps().append(qkv[:, 2:4], qkv[:, 4:], layer, expected, batch)
    native.append(qkv[:, 2:4], qkv[:, 4:], layer, found, batch)
    assert torch.equal(found, expected)


@DTYPES
@pytest.mark.parametrize("seed", range(12))
def test_attend_matches_the_reference(native: NativeOps, dtype: torch.dtype, seed: int) -> None:
    choose = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    kv_heads = choose.choice([1, 2, 3])
    shape = Shape(
        heads=kv_heads * choose.choice([1, 2, 4, 5]),
        kv_heads=kv_heads,
        head_dim=choose.choice([8, 16, 64, 80, 128]),
        page_size=choose.choice([1, 8, 16, 24, 64]),
        window=choose.choice([None, None, 1, 33, 100]),
    )
    rows = [
        (choose.choice([0, 0, 1, 63, 64, 500, 511, 1100]), choose.choice([1, 1, 2, 6, 40, 130]))
        for _ in range(choose.randint(1, 4))
    ]
    batch, pages = make_batch(rows, shape.page_size, g)
    kv = torch.randn(pages, 2, kv_heads, shape.page_size, shape.head_dim, generator=g).to(dtype)
    kv[0] = torch.nan  # the null page is nobody's
    tokens = sum(tokens for _, tokens in rows)
    q = torch.randn(tokens, shape.heads, shape.head_dim, generator=g).to(dtype)
    # Keys past a row's end, in its last page, hold whatever was there before.
    for row, (before, new) in enumerate(rows):
        used = (before + new) % shape.page_size
        if used:
            kv[batch.page_table[row, (before + new) // shape.page_size], :, :, used:] = torch.nan
    clean = kv.nan_to_num(0.0)
    close(
        native.attend(q, kv, shape.layer(), batch), attend_reference(q, clean, shape.layer(), batch)
    )


@DTYPES
@pytest.mark.parametrize("window", [None, 90])
def test_a_token_depends_on_its_row_alone(
    native: NativeOps, dtype: torch.dtype, window: int | None, threads: None
) -> None:
    """Bit for bit the same in any batch, chunk and number of threads."""
    g = torch.Generator().manual_seed(1)
    shape = Shape(heads=6, kv_heads=2, head_dim=64, window=window)
    rows = [(0, 70), (1500, 1), (613, 5), (700, 33)]
    batch, pages = make_batch(rows, shape.page_size, g)
    kv = torch.randn(pages, 2, 2, 16, 64, generator=g).to(dtype)
    q = torch.randn(109, 6, 64, generator=g).to(dtype)
    layer = shape.layer()
    torch.set_num_threads(1)
    together = native.attend(q, kv, layer, batch)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert torch.equal(native.attend(q, kv, layer, batch), together)
        for row, (_, tokens) in enumerate(rows):
            first = int(batch.query_starts[row])
            for step in {1, 7, tokens}:
                for begin in range(0, tokens, step):
                    end = min(begin + step, tokens)
                    pick = slice(first + begin, first + end)
                    alone = native.attend(q[pick], kv, layer, only(batch, row, begin, end))
                    assert torch.equal(alone, together[pick]), (count, row, begin, end)


@DTYPES
def test_pointwise_operators_are_independent_of_rows_and_threads(
    native: NativeOps, dtype: torch.dtype, threads: None
) -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(300, 1280, generator=g).to(dtype)
    weight = torch.randn(1280, generator=g).to(dtype)
    for count in (1, 3):
        torch.set_num_threads(count)
        for whole, alone in (
            (native.rms_norm(x, weight, 1e-6), native.rms_norm(x[7:8], weight, 1e-6)),
            (native.silu_mul(x), native.silu_mul(x[7:8])),
        ):
            assert torch.equal(whole[7:8], alone)


def test_unsupported_types_and_layouts_are_refused(native: NativeOps) -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="all fp32 or all bf16"):
        native.rms_norm(x.half(), torch.ones(8).half(), 1e-6)
    with pytest.raises(ValueError, match="all fp32 or all bf16"):
        native.rms_norm(x, torch.ones(8, dtype=torch.bfloat16), 1e-6)
    batch, pages = make_batch([(0, 2)], 4, torch.Generator())
    k = torch.zeros(2, 2, 8)
    layer = Shape(2, 2, 8, 4).layer()
    with pytest.raises(ValueError, match="KV pool"):
        native.append(k, k, layer, torch.zeros(pages, 2, 3, 4, 8), batch)
    with pytest.raises(ValueError, match="KV pool"):
        native.append(k, k, layer, torch.zeros(pages, 2, 2, 8, 4).transpose(3, 4), batch)
    q = torch.zeros(2, 2, 8)
    short = replace(batch, positions=batch.positions.int())
    with pytest.raises(ValueError, match="int64"):
        native.attend(q, torch.zeros(pages, 2, 2, 4, 8), Shape(2, 2, 8, 4).layer(), short)
