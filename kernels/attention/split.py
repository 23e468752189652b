"""What the Triton attention kernels share: ragged query blocks, splits of positions, their merge.

A kernel's grid is (blocks of query rows, KV heads, splits). All three come from bounds that the
host knows; which row a program works for, and whether there is anything for it to do, it finds out
from lengths on the device. So nothing is read back, and a CUDA graph captured for a bound serves
every step within it. A query row is one query head of one token: heads that share a KV head are
rows of one matrix product.

Positions are cut into splits, each of which makes an output and a log-sum-exp of its own, and these
are merged (Flash-Decoding; the running softmax within a split is Milakov & Gimelshein's, 2018).
Splits and tiles start at multiples of their lengths counted from position 0, so that a token's sums
have the same order whatever it is batched with, as long as splits are of one length.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv.triton_launch import Launch, dense_heads
from kernels.ops import AttentionBatch, AttentionLayer

# Positions of a split, unless the splits' outputs would be too many numbers: one sequence of 1,000
# tokens is then the work of 4 programs a KV head. Chosen by calculation, not measured yet.
SPLIT = 256
PARTIALS = 1 << 22  # fp32 numbers of all splits' outputs that are still fine; they fit the L2 cache
TILE = 64  # positions
# Query rows of a matrix product. Sixteen rows are multiplied by each warp for itself, 64 by four
# warps together; what lies between suits neither.
FEW, MANY = 16, 64
MERGE_TILE = 16  # splits


class Partials(NamedTuple):
    """Of each split. Where a split has nothing that a token may see, its `lse` is -inf and its
    `out` is not written, unless there is only one: that is the result, with zeros there."""

    out: Tensor  # [splits, tokens, heads, head_dim] fp32; of one split in the dtype of queries
    # [splits, tokens, heads] fp32, base 2, of the scaled scores with keys as they are stored: where
    # a mean is subtracted from keys, that is less than with the keys by the query's score with it.
    lse: Tensor


def query_rows(max_query: int, group: int, blocks: tuple[int, ...]) -> dict[str, int | float]:
    """How many query rows a program has: the smallest of `blocks` that holds the longest row of the
    step, else the largest. `group`: query heads of a KV head."""
    wanted = max_query * group
    block = next((block for block in blocks if block >= wanted), blocks[-1])
    block = max(block, triton.next_power_of_2(group))
    return {"group": group, "block": block, "whole_rows": wanted <= block}


def split_length(numbers: int, max_kv: int) -> int:
    """Positions of a split for a step of so many numbers of output.

    By no means by the lengths of rows: a token's result would then depend on its batch. Steps with
    long chunks have programs enough without many splits, and too many numbers for them.
    """
    split = SPLIT
    while split < max_kv and triton.cdiv(max_kv, split) * numbers > PARTIALS:
        split *= 2
    return split


def launch_splits(
    kernel: Any,
    launch: Launch,
    q: Tensor,
    kv: Tensor,
    layer: AttentionLayer,
    batch: AttentionBatch,
    split: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> Partials:
    """Runs `kernel`, which takes what is passed below, over a step.

    q: [tokens, heads, head_dim]; kv: the layer's pool. split: positions, a multiple of TILE; by
    default what `split_length` says. more: further arguments of the kernel, by name. Does not
    synchronise with the host. Rows of tokens that belong to no row of the batch are not written.
    Raises ValueError for other splits.
    """
    tokens, heads, head_dim = q.shape
    rows = batch.page_table.shape[0]
    split = split or split_length(tokens * heads * head_dim, batch.max_kv)
    if split % TILE:
        raise ValueError(f"splits of {split} positions are not whole tiles of {TILE}")
    splits = max(triton.cdiv(batch.max_kv, split), 1)
    dtype = q.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, tokens, heads, head_dim, dtype=dtype, device=q.device)
    lse = torch.empty(splits, tokens, heads, device=q.device)
    block_tokens = int(launch.constants["block"]) // int(launch.constants["group"])
    blocks = rows if launch.constants["whole_rows"] else tokens // block_tokens + rows
    q = dense_heads(q)
    if tokens:
        kernel[(blocks, layer.num_kv_heads, splits)](
            q,
            kv,
            batch.positions,
            batch.query_starts,
            batch.kv_lengths,
            batch.page_table,
            out,
            lse,
            rows,
            tokens,
            q.stride(0),
            kv.stride(0),
            batch.page_table.stride(0),
            split,
            layer.window or 0,
            layer.scale * math.log2(math.e),
            **(more or {}),
            **launch.constants,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    return Partials(out, lse)


def merge(parts: Partials, dtype: torch.dtype) -> Tensor:
    """[tokens, heads, head_dim] in `dtype`; zeros for tokens that see nothing."""
    splits, tokens, heads, head_dim = parts.out.shape
    if splits == 1:
        return parts.out[0].to(dtype)
    out = torch.empty(tokens, heads, head_dim, dtype=dtype, device=parts.out.device)
    if tokens:
        launch = merge_launch(head_dim)
        _merge[(tokens * heads,)](
            parts.out,
            parts.lse,
            out,
            splits,
            tokens * heads,
            **launch.constants,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    return out


def merge_launch(head_dim: int) -> Launch:
    width = triton.next_power_of_2(head_dim)
    return Launch({"n": head_dim, "width": width, "tile": MERGE_TILE}, warps=4, stages=3)


@triton.jit
def query_block(
    query_starts: tl.tensor, rows: tl.tensor, block_tokens: tl.constexpr, whole_rows: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """This program's row, its first token of it, and the token behind the row's last."""
    program = tl.program_id(0)
    if whole_rows:
        row = program
        first = tl.load(query_starts + row)
    else:
        # Row r's programs begin at query_starts[r] // block_tokens + r: that leaves room for every
        # row's blocks, whatever their lengths, and takes no reading of lengths on the host.
        row, above = tl.full((), 0, tl.int32), rows
        while above - row > 1:
            middle = (row + above) // 2
            begin = tl.load(query_starts + middle) // block_tokens + middle
            row = tl.where(begin <= program, middle, row)
            above = tl.where(begin <= program, above, middle)
        first = tl.load(query_starts + row)
        first += (program - (first // block_tokens + row)) * block_tokens
    return row, first, tl.load(query_starts + row + 1)


@triton.jit
def positions_of(
    token: tl.tensor,  # [block], of each query row
    valid: tl.tensor,  # [block]
    row: tl.tensor,
    part: tl.tensor,  # the split
    positions: tl.tensor,
    kv_lengths: tl.tensor,
    split: tl.tensor,
    window: tl.tensor,
    tile: tl.constexpr,
    windowed: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Each query row's position, -1 where there is none; the first position that this split looks
    at, a multiple of the tile, and the one behind its last."""
    position = tl.load(positions + token, mask=valid, other=-1).to(tl.int32)
    last = tl.minimum(tl.max(position, 0) + 1, tl.load(kv_lengths + row))
    start = part * split
    stop = tl.minimum(last, start + split)
    if windowed:
        lowest = tl.min(tl.where(valid, position, last), 0) - window + 1
        start = tl.maximum(start, tl.maximum(lowest, 0) // tile * tile)
    return position, start, stop


@triton.jit
def see(
    scores: tl.tensor,  # [block, tile]
    at: tl.tensor,  # [tile] positions
    known: tl.tensor,  # [tile], whether they are there
    position: tl.tensor,  # [block]
    window: tl.tensor,
    windowed: tl.constexpr,
) -> tl.tensor:
    """Scores, -inf where a query row does not see a position."""
    seen = known[None, :] & (at[None, :] <= position[:, None])
    if windowed:
        seen &= at[None, :] > position[:, None] - window
    return tl.where(seen, scores, -float("inf"))


@triton.jit
def recent(position: tl.tensor, latest: tl.constexpr) -> tl.tensor:
    """As `Windows.recent`, for blocks of `latest`."""
    return position - position % latest if latest > 0 else position + 1


@triton.jit
def near_tiles(
    near: tl.tensor,  # [block], of `recent`
    valid: tl.tensor,  # [block]
    start: tl.tensor,
    stop: tl.tensor,
    sink: tl.constexpr,
    latest: tl.constexpr,
    tile: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Where a split from `start` to `stop` is read dense: from which position on any row does; how
    many tiles hold sinks; where the tiles of the rows' blocks that are not among them begin; and
    how many tiles there are of both."""
    first_near = tl.min(tl.where(valid, near, stop), 0)
    sinks = tl.maximum(tl.cdiv(tl.minimum(stop, sink) - start, tile), 0)
    blocks_start = tl.maximum(start + sinks * tile, first_near // tile * tile)
    tiles = sinks
    if latest > 0:
        tiles += tl.maximum(tl.cdiv(stop - blocks_start, tile), 0)
    return first_near, sinks, blocks_start, tiles


@triton.jit
def soften(
    scores: tl.tensor, best: tl.tensor, norm: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A tile's weights, what earlier sums are multiplied by, and the new maximum and norm.

    scores: [block, tile], for powers of two; best, norm: [block]. `best` starts with a finite
    number, so that no infinity is taken from another.
    """
    higher = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    decay = tl.exp2(best - higher)
    return weights, decay, higher, norm * decay + tl.sum(weights, 1)


@triton.jit
def store_lse(
    at: tl.tensor, best: tl.tensor, norm: tl.tensor, valid: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Writes the log-sum-exp; returns which rows saw anything, and their norms, 1 for the rest."""
    found = norm > 0
    norm = tl.where(found, norm, 1.0)
    tl.store(at, tl.where(found, best + tl.log2(norm), -float("inf")), mask=valid)
    return found, norm


@triton.jit(do_not_specialize=["splits", "rows"])
def _merge(
    parts: tl.tensor,  # [splits, rows, n] fp32; a row is one head of one token
    lse: tl.tensor,  # [splits, rows] fp32
    out: tl.tensor,  # [rows, n], written
    splits: tl.tensor,
    rows: tl.tensor,
    n: tl.constexpr,
    width: tl.constexpr,  # a power of two, at least n
    tile: tl.constexpr,  # splits; always the same, for the same order of sums
) -> None:
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, width)
    inside = dim < n
    best = -float("inf")
    for begin in range(0, splits, tile):
        split = begin + tl.arange(0, tile)
        found = tl.load(lse + split * rows + row, mask=split < splits, other=-float("inf"))
        best = tl.maximum(best, tl.max(found, 0))
    best = tl.where(best == -float("inf"), 0.0, best)
    norm = 0.0
    total = tl.zeros((width,), tl.float32)
    for begin in range(0, splits, tile):
        split = begin + tl.arange(0, tile)
        found = tl.load(lse + split * rows + row, mask=split < splits, other=-float("inf"))
        weight = tl.exp2(found - best)
        at = (split * rows + row)[:, None] * n + dim[None, :]
        read = (found > -float("inf"))[:, None] & inside[None, :]
        x = tl.load(parts + at, mask=read, other=0.0)
        norm += tl.sum(weight, 0)
        total += tl.sum(x * weight[:, None], 0)
    total = total / tl.where(norm > 0, norm, 1.0)
    tl.store(out + row * n + dim, total.to(out.dtype.element_ty), mask=inside)
