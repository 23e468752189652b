"""Attention over dense pages, as a Triton kernel: decoding, verification of drafts and prefill.

The pages are read where they lie, by the page table; see `kernels.attention.split` for how the work
is cut. Keys and values are read once for all query heads that share them.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.split import (
    FEW,
    MANY,
    TILE,
    launch_splits,
    merge,
    positions_of,
    query_block,
    query_rows,
    see,
    soften,
    store_lse,
)
from kernels.kv.triton_launch import Launch
from kernels.ops import AttentionBatch, AttentionLayer

PREFILL = 128  # query rows: each key is read for so many, by eight warps
SMALLEST_HEAD = 16  # dimensions: what a matrix product takes
LARGEST_HEAD = 256
# In which a tile's page numbers, then its keys and values, are on their way. With few query rows
# three stages leave one tile of keys and values under way, five leave two (as compiled).
STAGES, DECODE_STAGES = 3, 5


def attend(
    q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch, split: int | None = None
) -> Tensor:
    """As `Ops.attend`. q: [tokens, heads, head_dim]; kv: [pages, 2, kv_heads, page_size, head_dim]
    of q's dtype. `split` as in `split.launch_splits`. Does not synchronise with the host."""
    launch = attend_launch(layer, kv.shape[3], batch.max_query, q.dtype)
    return merge(launch_splits(_attend, launch, q, kv, layer, batch, split), q.dtype)


def takes(layer: AttentionLayer) -> bool:
    """Whether the kernel is made for such heads."""
    return SMALLEST_HEAD <= layer.head_dim <= LARGEST_HEAD


def attend_launch(
    layer: AttentionLayer, page_size: int, max_query: int, dtype: torch.dtype
) -> Launch:
    rows = query_rows(max_query, layer.num_heads // layer.num_kv_heads, (FEW, MANY, PREFILL))
    constants = {
        **rows,
        "kv_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "width": triton.next_power_of_2(layer.head_dim),
        "page_size": page_size,
        "tile": TILE,
        "windowed": layer.window is not None,
    }
    warps = 8 if rows["block"] >= PREFILL else 4
    if layer.head_dim * dtype.itemsize > 256:  # wide heads or 32 bits: or shared memory ends
        return Launch(constants, warps, STAGES - 1)
    return Launch(constants, warps, DECODE_STAGES if rows["block"] == FEW else STAGES)


@triton.jit(do_not_specialize=["rows", "tokens", "table_stride", "window"])
def _attend(
    q: tl.tensor,  # [tokens, heads, head_dim]
    kv: tl.tensor,  # [pages, 2, kv_heads, page_size, head_dim]
    positions: tl.tensor,  # [tokens] int64
    query_starts: tl.tensor,  # [rows + 1] int32
    kv_lengths: tl.tensor,  # [rows] int32
    page_table: tl.tensor,  # [rows, pages] int32
    out: tl.tensor,  # [splits, tokens, heads, head_dim], written
    lse: tl.tensor,  # [splits, tokens, heads] fp32, written
    rows: tl.tensor,
    tokens: tl.tensor,
    q_stride: tl.tensor,
    page_stride: tl.tensor,
    table_stride: tl.tensor,
    split: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,  # of scores, for powers of two
    group: tl.constexpr,
    block: tl.constexpr,  # query rows
    whole_rows: tl.constexpr,  # a program has all tokens of a row
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,  # a power of two, at least head_dim
    page_size: tl.constexpr,
    tile: tl.constexpr,  # positions
    windowed: tl.constexpr,
) -> None:
    block_tokens: tl.constexpr = block // group
    kv_head, part = tl.program_id(1), tl.program_id(2)
    row, first, behind = query_block(query_starts, rows, block_tokens, whole_rows)
    if first >= behind:
        return
    m = tl.arange(0, block)
    token = first + m // group
    head = kv_head * group + m % group
    valid = (m < block_tokens * group) & (token < behind)
    position, start, stop = positions_of(
        token, valid, row, part, positions, kv_lengths, split, window, tile, windowed
    )

    dim = tl.arange(0, width)
    inside = dim < head_dim
    q_at = q + (token.to(tl.int64) * q_stride + head * head_dim)[:, None] + dim[None, :]
    queries = tl.load(q_at, mask=valid[:, None] & inside[None, :], other=0.0)

    best = tl.full((block,), -1e30, tl.float32)
    norm = tl.zeros((block,), tl.float32)
    total = tl.zeros((block, width), tl.float32)
    table = page_table + row.to(tl.int64) * table_stride
    for begin in range(start, stop, tile):
        at = begin + tl.arange(0, tile)
        known = at < stop
        page = tl.load(table + at // page_size, mask=known, other=0).to(tl.int64) * page_stride
        place = page + (kv_head * page_size + at % page_size) * head_dim
        keys = tl.load(kv + place[None, :] + dim[:, None], mask=inside[:, None], other=0.0)
        scores = tl.dot(queries, keys, input_precision="tf32x3") * scale
        scores = see(scores, at, known, position, window, windowed)
        weights, decay, best, norm = soften(scores, best, norm)
        # What lies behind the row's last position may be anything, even a NaN.
        value_at = place + kv_heads * page_size * head_dim
        read = known[:, None] & inside[None, :]
        values = tl.load(kv + value_at[:, None] + dim[None, :], mask=read, other=0.0)
        total *= decay[:, None]
        total = tl.dot(weights.to(values.dtype), values, acc=total, input_precision="tf32x3")

    out_row = (part * tokens + token).to(tl.int64) * (group * kv_heads) + head
    found, norm = store_lse(lse + out_row, best, norm, valid)
    # What one split alone makes is the result, zeros where nothing is seen.
    written = (valid & (found | (tl.num_programs(2) == 1)))[:, None] & inside[None, :]
    out_at = out + (out_row * head_dim)[:, None] + dim[None, :]
    tl.store(out_at, (total / norm[:, None]).to(out.dtype.element_ty), mask=written)
