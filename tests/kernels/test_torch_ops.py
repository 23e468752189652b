"""The small operations against their specifications."""

from __future__ import annotations

import pytest
import torch

from kernels.activation import silu_mul_reference
from kernels.kv.dense import append_reference
from kernels.norm import rms_norm_reference
from kernels.ops import AttentionLayer
from kernels.rope import rotate_reference
from kernels.torch_ops import TorchOps
from tests.kernels.batches import Rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding of the result, and in 16 bits sometimes one more on the way.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (5, 320), (3, 4, 128)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=g) * 3).to(dtype)
    weight = torch.randn(shape[-1], generator=g).to(dtype)
    close(TorchOps().rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(6, 48, generator=g).to(dtype) for _ in range(2))
    weight = torch.randn(48, generator=g).to(dtype)
    total = x + residual
    normed, carried = TorchOps().add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(carried, total)
    close(normed, rms_norm_reference(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype) -> None:
    x = (torch.randn(9, 2 * 37, generator=torch.Generator().manual_seed(2)) * 4).to(dtype)
    x[0, 0], x[0, 1] = -120.0, 120.0  # exp overflows in fp32; the gate goes to zero, not NaN
    close(TorchOps().silu_mul(x), silu_mul_reference(x))
    assert TorchOps().silu_mul(x).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("rotary", [None, 32, 16])
def test_rope_append(dtype: torch.dtype, normed: bool, rotary: int | None) -> None:
    """Norm, then rotation at the tokens' positions, then both keys and values into their slots."""
    g = torch.Generator().manual_seed(3)
    rows = Rows.shuffled([70, 20, 33], 8, g)
    batch = rows.step([(0, 50, 70), (1, 19, 20), (2, 0, 33)])
    tokens = len(batch.positions)
    table = torch.randn(80, 2, rotary // 2, generator=g) if rotary else None
    weights = [torch.randn(32, generator=g).to(dtype) if normed else None for _ in range(2)]
    layer = AttentionLayer(4, 2, 32, 1.0, table, *weights, norm_eps=1e-6)
    qkv = torch.randn(tokens, 8 * 32, generator=g).to(dtype)
    kv = torch.randn(rows.num_pages, 2, 2, 8, 32, generator=g).to(dtype)
    expected_kv = kv.clone()

    q, k, v = qkv.view(tokens, 8, 32).split([4, 2, 2], dim=1)
    if normed:
        q, k = (rms_norm_reference(x, w, 1e-6) for x, w in zip((q, k), weights, strict=True))
    if table is not None:
        q, k = (rotate_reference(x, table[batch.positions]) for x in (q, k))
    append_reference(k, v, expected_kv, batch.kv_slots)

    found = TorchOps().rope_append(qkv, layer, kv, batch)
    close(found, q)
    close(kv, expected_kv)


@pytest.mark.parametrize("hidden", [64, 33, 320])
def test_rows_do_not_depend_on_each_other(hidden: int) -> None:
    """fp32: bitwise the same result for a row, whichever rows surround it."""
    g = torch.Generator().manual_seed(4)
    ops = TorchOps()
    x = torch.randn(70, 2 * hidden, generator=g)
    weight = torch.randn(2 * hidden, generator=g)
    silu, norm = ops.silu_mul(x), ops.rms_norm(x, weight, 1e-6)
    for start, stop in ((0, 1), (1, 2), (3, 20), (69, 70), (31, 64)):
        assert torch.equal(ops.silu_mul(x[start:stop].clone()), silu[start:stop])
        assert torch.equal(ops.rms_norm(x[start:stop].clone(), weight, 1e-6), norm[start:stop])
