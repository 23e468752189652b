"""The rotation of heads as a Triton kernel: `Rotation` on a GPU, in one pass instead of many.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv.rotation import Rotation, signs
from kernels.kv.triton_launch import Launch

ROWS = 16  # heads of tokens that one program rotates


def turn(rotation: Rotation | None, x: Tensor, *, back: bool) -> Tensor:
    """x: [tokens, heads, head_dim], a power of two -> `rotation.forth(x)` or `back`, in x's dtype.

    None: x as it is. Does not synchronise with the host, but for the first call's copying of the
    signs."""
    if rotation is None or x.numel() == 0:
        return x
    x = x.contiguous()
    head_dim = x.shape[-1]
    rows = x.numel() // head_dim
    out = torch.empty_like(x)
    launch = turn_launch(head_dim, back)
    _turn[(triton.cdiv(rows, ROWS),)](
        x,
        signs_on(head_dim, x.device),
        out,
        rows,
        **launch.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=False,  # for the torch form's bits
    )
    return out


def turn_launch(head_dim: int, back: bool) -> Launch:
    return Launch({**hadamard_constants(head_dim), "back": back, "block": ROWS}, warps=4, stages=1)


def hadamard_constants(head_dim: int) -> dict[str, int | float]:
    return {
        "head_dim": head_dim,
        "stages": head_dim.bit_length() - 1,
        "norm": 1.0 / math.sqrt(head_dim),
    }


@lru_cache(maxsize=16)
def signs_on(head_dim: int, device: torch.device) -> Tensor:
    return signs(head_dim).to(device)


@triton.jit(do_not_specialize=["rows"])
def _turn(
    x: tl.tensor,  # [rows, head_dim]
    signs: tl.tensor,  # [head_dim] fp32
    out: tl.tensor,  # [rows, head_dim], written
    rows: tl.tensor,
    head_dim: tl.constexpr,
    stages: tl.constexpr,
    norm: tl.constexpr,
    back: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    dim = tl.arange(0, head_dim)
    at = row[:, None] * head_dim + dim[None, :]
    valid = (row < rows)[:, None]
    y = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    sign = tl.load(signs + dim)[None, :]
    if back:
        y = hadamard(y, block, head_dim, stages, norm) * sign
    else:
        y = hadamard(y * sign, block, head_dim, stages, norm)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=valid)


@triton.jit
def hadamard(
    x: tl.tensor, rows: tl.constexpr, n: tl.constexpr, stages: tl.constexpr, norm: tl.constexpr
) -> tl.tensor:
    """Of [rows, n] fp32: butterflies in the order of `rotation.hadamard`, for the same bits."""
    for i in tl.static_range(stages):
        pairs = tl.reshape(x, (rows, n >> (i + 1), 2, 1 << i))
        low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        pairs = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
        x = tl.reshape(pairs, (rows, n))
    return x * norm
