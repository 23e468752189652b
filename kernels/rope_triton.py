"""Per-head norm, rotary embedding and the append to dense pages, as one Triton kernel.

For pages of other formats the rotated keys go beside the queries instead, for the format's own
append to read. The measure is `TorchOps.rope_append`.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv.triton_launch import Launch
from kernels.ops import AttentionBatch, AttentionLayer

HEADS = 8  # of one token, that a program has


def rope_append(qkv: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch) -> Tensor:
    """As `Ops.rope_append`, for dense pages of qkv's dtype. Does not synchronise with the host."""
    return _run(qkv, layer, batch, kv)


def rope(
    qkv: Tensor, layer: AttentionLayer, batch: AttentionBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each [tokens, its heads, head_dim]; nothing is appended."""
    heads, kv_heads = layer.num_heads, layer.num_kv_heads
    qk = _run(qkv, layer, batch, None)
    v = qkv.unflatten(1, (heads + 2 * kv_heads, layer.head_dim))[:, heads + kv_heads :]
    return qk[:, :heads], qk[:, heads:], v


def _run(qkv: Tensor, layer: AttentionLayer, batch: AttentionBatch, kv: Tensor | None) -> Tensor:
    """kv: the dense pool; None: keys are returned behind the queries."""
    tokens = qkv.shape[0]
    kept = layer.num_heads + (0 if kv is not None else layer.num_kv_heads)
    out = torch.empty(tokens, kept, layer.head_dim, dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return out
    launch = rope_launch(layer, None if kv is None else kv.shape[3])
    computed = layer.num_heads + layer.num_kv_heads * (2 if kv is not None else 1)
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    _rope[(tokens, triton.cdiv(computed, HEADS))](
        qkv,
        qkv if layer.q_norm is None else layer.q_norm,
        qkv if layer.k_norm is None else layer.k_norm,
        qkv if layer.cos_sin is None else layer.cos_sin,
        batch.positions,
        batch.kv_slots,
        out,
        out if kv is None else kv,
        qkv.stride(0),
        0 if kv is None else kv.stride(0),
        layer.norm_eps,
        **launch.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out


def rope_launch(layer: AttentionLayer, page_size: int | None) -> Launch:
    """page_size: of dense pages; None: nothing is appended."""
    constants = {
        "heads": layer.num_heads,
        "kv_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "width": triton.next_power_of_2(layer.head_dim),
        "half": 0 if layer.cos_sin is None else layer.cos_sin.shape[-1],
        "page_size": page_size or 0,
        "normed": layer.q_norm is not None and layer.k_norm is not None,
        "block": HEADS,
    }
    return Launch(constants, warps=4, stages=1)


@triton.jit
def _rope(
    qkv: tl.tensor,  # [tokens, heads + 2 * kv_heads, head_dim]
    q_norm: tl.tensor,  # [head_dim]
    k_norm: tl.tensor,  # [head_dim]
    cos_sin: tl.tensor,  # [positions, 2, half] fp32
    positions: tl.tensor,  # [tokens] int64
    kv_slots: tl.tensor,  # [tokens] int64
    out: tl.tensor,  # [tokens, heads or heads + kv_heads, head_dim], written
    kv: tl.tensor,  # [pages, 2, kv_heads, page_size, head_dim], written
    qkv_stride: tl.tensor,
    page_stride: tl.tensor,
    eps: tl.tensor,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,  # a power of two, at least head_dim
    half: tl.constexpr,  # of the dimensions that turn; 0: none
    page_size: tl.constexpr,  # 0: keys go to `out`, values nowhere
    normed: tl.constexpr,
    block: tl.constexpr,  # heads
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * block + tl.arange(0, block)
    dim = tl.arange(0, width)
    inside = dim < head_dim
    valid = (head < heads + 2 * kv_heads)[:, None] & inside[None, :]
    row = qkv + token * qkv_stride + (head * head_dim)[:, None]
    x = tl.load(row + dim[None, :], mask=valid, other=0.0)
    kind: tl.constexpr = x.dtype
    y = x.to(tl.float32)
    is_query = (head < heads)[:, None]

    if normed:
        scale = 1.0 / tl.sqrt_rn(tl.sum(y * y, 1) / head_dim + eps)[:, None]
        q_weight = tl.load(q_norm + dim, mask=inside, other=0.0).to(tl.float32)[None, :]
        k_weight = tl.load(k_norm + dim, mask=inside, other=0.0).to(tl.float32)[None, :]
        # Rounded as what a norm by itself gives.
        y = (y * scale * tl.where(is_query, q_weight, k_weight)).to(kind).to(tl.float32)
    if half > 0:
        turns = dim < 2 * half
        other = tl.where(turns, tl.where(dim < half, dim + half, dim - half), dim)
        z = tl.load(row + other[None, :], mask=valid, other=0.0).to(tl.float32)
        if normed:
            q_weight = tl.load(q_norm + other, mask=inside, other=0.0).to(tl.float32)[None, :]
            k_weight = tl.load(k_norm + other, mask=inside, other=0.0).to(tl.float32)[None, :]
            z = (z * scale * tl.where(is_query, q_weight, k_weight)).to(kind).to(tl.float32)
        angle = cos_sin + tl.load(positions + token) * (2 * half) + dim % half
        cos = tl.load(angle, mask=turns, other=1.0)[None, :]
        sin = tl.load(angle + half, mask=turns, other=0.0)[None, :]
        y = y * cos + z * tl.where(dim < half, -sin, sin)

    found = y.to(kind)
    if page_size == 0:
        kept = (head < heads + kv_heads)[:, None] & inside[None, :]
        at = out + (token * (heads + kv_heads) + head)[:, None] * head_dim + dim[None, :]
        tl.store(at, found, mask=kept)
    else:
        at = out + (token * heads + head)[:, None] * head_dim + dim[None, :]
        tl.store(at, found, mask=is_query & inside[None, :])
        # Keys, then values: heads of a page, in the order in which they stand in qkv.
        slot = tl.load(kv_slots + token)
        unit = (head - heads) * page_size + slot % page_size
        at = kv + slot // page_size * page_stride + (unit * head_dim)[:, None] + dim[None, :]
        is_value = (head >= heads + kv_heads)[:, None]
        tl.store(at, tl.where(is_value, x, found), mask=valid & (head >= heads)[:, None])
