"""Attention over dense pages, as a Triton kernel: decoding, verification of drafts and prefill.

The pages are read where they lie, by the page table; see `kernels.attention.split` for how the work
is cut. Keys and values are read once for all query heads that share them.

Pages of eight-bit floats (`Float8`) lie as dense ones do and are read by the same kernel: their
numbers are exact in every type that a model computes in, so they become that type on the way to the
product. Scales of heads meet the scores and the sums, once for all positions. Where there are
windows, a program walks over its split twice, as over packed pages.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

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
    near_tiles,
    positions_of,
    query_block,
    query_rows,
    recent,
    see,
    soften,
    store_lse,
)
from kernels.kv.paged import Paged
from kernels.kv.triton_launch import Launch
from kernels.kv.windows import Windows
from kernels.ops import AttentionBatch, AttentionLayer

PREFILL = 128  # query rows: each key is read for so many, by eight warps
SMALLEST_HEAD = 16  # dimensions: what a matrix product takes
LARGEST_HEAD = 256
# In which a tile's page numbers, then its keys and values, are on their way. With few query rows
# three stages leave one tile of keys and values under way, five leave two (as compiled).
STAGES, DECODE_STAGES = 3, 5
CAPABILITY = (8, 9)  # from which on GPUs turn eight-bit floats (e4m3) into others: Ada and Hopper
# Arguments of the kernel that dense pages have nothing for.
FLOATS_ALONE = ("head_scales", "copies", "copies_table", "copies_stride")


def attend(
    q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch, split: int | None = None
) -> Tensor:
    """As `Ops.attend`. q: [tokens, heads, head_dim]; kv: [pages, 2, kv_heads, page_size, head_dim]
    of q's dtype. `split` as in `split.launch_splits`. Does not synchronise with the host."""
    launch = attend_launch(layer, kv.shape[3], batch.max_query, q.dtype)
    more = dict.fromkeys(FLOATS_ALONE)
    return merge(launch_splits(_attend, launch, q, kv, layer, batch, split, more), q.dtype)


def attend_floats(
    q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch, split: int | None = None
) -> Tensor:
    """As `attend`, over pages of `Float8`. kv: [pages, bytes] uint8, of `layer.kv`; its keys and
    values are each [kv_heads, page_size, head_dim]."""
    paged = layer.kv
    assert isinstance(paged, Paged)
    more: dict[str, Any] = dict.fromkeys(FLOATS_ALONE)
    if paged.scales is not None:
        more["head_scales"] = paged.scales_on(kv.device)
    if paged.windows is not None:
        assert batch.copies is not None
        table = batch.copies.table
        pages = paged.dense(kv, batch.copies.count, q.dtype)
        more |= {"copies": pages, "copies_table": table, "copies_stride": table.stride(0)}
    size = paged.layout.page_size
    launch = attend_launch(layer, size, batch.max_query, q.dtype, paged.windows)
    codes = kv.view(torch.float8_e4m3fn)
    return merge(launch_splits(_attend, launch, q, codes, layer, batch, split, more), q.dtype)


def takes(layer: AttentionLayer) -> bool:
    """Whether the kernel is made for such heads."""
    return SMALLEST_HEAD <= layer.head_dim <= LARGEST_HEAD


def reads_floats() -> bool:
    """Whether what there is has instructions for eight-bit floats; Triton's interpreter has."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= CAPABILITY


def attend_launch(
    layer: AttentionLayer,
    page_size: int,
    max_query: int,
    dtype: torch.dtype,
    windows: Windows | None = None,
) -> Launch:
    """`dtype`: of queries; `windows`: of what is not dense throughout."""
    width = triton.next_power_of_2(layer.head_dim)
    size = width * dtype.itemsize  # bytes of a head
    # Of wide heads, or of 32 bits, tiles are shorter, or shared memory and registers end. They are
    # so for few rows, too: how many there are must not change the order of a token's sums.
    blocks = (FEW, MANY, PREFILL) if size <= 512 else (FEW,)
    rows = query_rows(max_query, layer.num_heads // layer.num_kv_heads, blocks)
    constants = {
        **rows,
        "kv_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "width": width,
        "page_size": page_size,
        "tile": TILE if size <= 256 else TILE // 2,
        "windowed": layer.window is not None,
        "sink": 0 if windows is None else windows.sink,
        "latest": 0 if windows is None else windows.block,
    }
    warps = 8 if rows["block"] >= PREFILL or size > 512 else 4
    if size > 256:
        return Launch(constants, warps, STAGES - 1)
    return Launch(constants, warps, DECODE_STAGES if rows["block"] == FEW else STAGES)


@triton.jit(do_not_specialize=["rows", "tokens", "table_stride", "window", "copies_stride"])
def _attend(
    q: tl.tensor,  # [tokens, heads, head_dim]
    kv: tl.tensor,  # [pages, 2, kv_heads, page_size, head_dim], as queries or e4m3
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
    head_scales: tl.tensor | None,  # [2, kv_heads] fp32, of keys and of values
    copies: tl.tensor | None,  # [dense pages, 2, kv_heads, page_size, head_dim], with windows
    copies_table: tl.tensor | None,  # [rows, pages] int32
    copies_stride: tl.tensor | None,
    group: tl.constexpr,
    block: tl.constexpr,  # query rows
    whole_rows: tl.constexpr,  # a program has all tokens of a row
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,  # a power of two, at least head_dim
    page_size: tl.constexpr,
    tile: tl.constexpr,  # positions
    windowed: tl.constexpr,
    sink: tl.constexpr,  # first positions that are read dense
    latest: tl.constexpr,  # positions of a block of text, whose own is read dense; 0: none is
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

    # All that this split looks at, and what of it is not dense for any row.
    whole_start, whole_stop = start, stop
    if sink + latest > 0:
        near = recent(position, latest)  # from here on a row reads dense
        start = tl.maximum(start, sink // tile * tile)
        stop = tl.minimum(stop, tl.max(near, 0))

    best = tl.full((block,), -1e30, tl.float32)
    norm = tl.zeros((block,), tl.float32)
    total = tl.zeros((block, width), tl.float32)
    score_scale = scale
    if head_scales is not None:
        score_scale = scale * tl.load(head_scales + kv_head)
    table = page_table + row.to(tl.int64) * table_stride
    for begin in range(start, stop, tile):
        at = begin + tl.arange(0, tile)
        known = at < stop
        page = tl.load(table + at // page_size, mask=known, other=0).to(tl.int64) * page_stride
        place = page + (kv_head * page_size + at % page_size) * head_dim
        keys = tl.load(kv + place[None, :] + dim[:, None], mask=inside[:, None], other=0.0)
        keys = keys.to(queries.dtype)
        scores = tl.dot(queries, keys, input_precision="tf32x3") * score_scale
        scores = see(scores, at, known, position, window, windowed)
        if sink + latest > 0:
            far = (at >= sink)[None, :] & (at[None, :] < near[:, None])
            scores = tl.where(far, scores, -float("inf"))
        weights, decay, best, norm = soften(scores, best, norm)
        # What lies behind the row's last position may be anything, even a NaN.
        value_at = place + kv_heads * page_size * head_dim
        read = known[:, None] & inside[None, :]
        values = tl.load(kv + value_at[:, None] + dim[None, :], mask=read, other=0.0)
        values = values.to(queries.dtype)
        total *= decay[:, None]
        total = tl.dot(weights.to(values.dtype), values, acc=total, input_precision="tf32x3")
    if head_scales is not None:
        total *= tl.load(head_scales + kv_heads + kv_head)

    if sink + latest > 0:
        first_near, sinks, blocks_start, tiles = near_tiles(
            near, valid, whole_start, whole_stop, sink, latest, tile
        )
        table = copies_table + row.to(tl.int64) * copies_stride
        for i in range(0, tiles):
            begin = tl.where(i < sinks, whole_start + i * tile, blocks_start + (i - sinks) * tile)
            at = begin + tl.arange(0, tile)
            # What no row reads dense may have no copy: the null page holds anything.
            known = (at < whole_stop) & ((at < sink) | (at >= first_near))
            page = tl.load(table + at // page_size, mask=known, other=0).to(tl.int64)
            place = ((page * (2 * kv_heads) + kv_head) * page_size + at % page_size) * head_dim
            keys = tl.load(copies + place[None, :] + dim[:, None], mask=inside[:, None], other=0.0)
            scores = tl.dot(queries, keys, input_precision="tf32x3") * scale
            scores = see(scores, at, known, position, window, windowed)
            dense = (at < sink)[None, :] | (at[None, :] >= near[:, None])
            scores = tl.where(dense, scores, -float("inf"))
            weights, decay, best, norm = soften(scores, best, norm)
            value_at = place + kv_heads * page_size * head_dim
            read = known[:, None] & inside[None, :]
            values = tl.load(copies + value_at[:, None] + dim[None, :], mask=read, other=0.0)
            total *= decay[:, None]
            total = tl.dot(weights.to(values.dtype), values, acc=total, input_precision="tf32x3")

    out_row = (part * tokens + token).to(tl.int64) * (group * kv_heads) + head
    found, norm = store_lse(lse + out_row, best, norm, valid)
    # What one split alone makes is the result, zeros where nothing is seen.
    written = (valid & (found | (tl.num_programs(2) == 1)))[:, None] & inside[None, :]
    out_at = out + (out_row * head_dim)[:, None] + dim[None, :]
    tl.store(out_at, (total / norm[:, None]).to(out.dtype.element_ty), mask=written)
