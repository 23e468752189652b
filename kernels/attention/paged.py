"""Causal grouped-query attention over paged KV, in plain torch.

`attend_reference` is the specification. `PagedAttention` is the form that runs: keys are gathered
a fixed tile of positions at a time and the tiles' softmaxes merged by their running maxima
(Milakov & Gimelshein 2018), so the memory it needs is bounded whatever the context.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.tiles import QueryGroup, tiles
from kernels.kv import dense
from kernels.ops import AttentionBatch, AttentionLayer

TILE = 128  # positions
# 16-bit tiles by torch's fused attention are as long as this many keys' numbers, within limits:
# long for a few rows, where calls cost most, short for many, where the cache does.
FUSED_NUMBERS = 1 << 22
FUSED_TILES = (128, 1024)
# Rows with more queries than this are cut into blocks of BLOCK; the rest are padded together.
SHORT_QUERY = 16
BLOCK = 64
# Query rows of one matrix product in fp32 are padded to a multiple of this. Products of a few
# rows take other paths through the BLAS library, with another order of summation.
EXACT_ROWS = 16
# What a hidden position scores: finite, so that a tile of hidden positions only merges with
# weight exp(HIDDEN - maximum) = 0 and no infinity is ever subtracted from another.
HIDDEN = -1e30


def attend_reference(q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch) -> Tensor:
    """The specification: row by row, head by head, one softmax over all positions in fp32.

    Shapes as in `kernels.ops.Ops.attend`.
    """
    out = torch.empty_like(q)
    dtype, q = q.dtype, layer.kv.turn(q)
    group = layer.num_heads // layer.num_kv_heads
    windows, copies = layer.kv.windows, batch.copies
    starts = batch.query_starts.tolist()
    for row, length in enumerate(batch.kv_lengths.tolist()):
        tokens = slice(starts[row], starts[row + 1])
        stored = layer.kv.gather(kv, batch.page_table[row : row + 1].long())
        keys, values = (part[0, :, :length].float() for part in stored)
        at = batch.positions[tokens, None]
        position = torch.arange(length, device=q.device)
        hidden = position > at
        if layer.window is not None:
            hidden |= position <= at - layer.window
        near = torch.zeros_like(hidden)
        near_keys, near_values = keys, values
        if windows is not None and copies is not None:
            near = (position < windows.sink) | (position >= windows.recent(at))
            pool = layer.kv.dense(kv, copies.count, dtype)
            rows = dense.page_rows(copies.table[row : row + 1], pool)
            found = dense.gather(pool, rows)
            near_keys, near_values = (part[0, :, :length].float() for part in found)
        for head in range(layer.num_heads):
            of = head // group
            asked = q[tokens, head].float()
            scores = torch.where(near, asked @ near_keys[of].T, asked @ keys[of].T) * layer.scale
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            sums = (
                weights.where(near, 0.0) @ near_values[of] + weights.where(~near, 0.0) @ values[of]
            )
            out[tokens, head] = sums.to(q.dtype)
    return layer.kv.turn_back(out)


def plan_queries(batch: AttentionBatch) -> tuple[QueryGroup, ...]:
    """Sorts a step's rows into at most two groups: short ones, and blocks of long ones.

    A step whose rows are all equally short, plain decoding for one, is a single group without any
    gathering. Other steps read the query lengths on the host.
    """
    rows = batch.page_table.shape[0]
    total = batch.positions.shape[0]
    if batch.max_query <= SHORT_QUERY and batch.max_query * rows == total:
        positions = batch.positions.view(rows, batch.max_query)
        pages, where = batch.page_table.long(), batch.copies
        copies = () if where is None else (where.table.long(), where.count)
        return (QueryGroup(None, None, positions, pages, batch.max_kv, *copies),)
    starts = batch.query_starts.long()
    lengths = starts[1:] - starts[:-1]
    short = lengths <= SHORT_QUERY
    picks = (short.nonzero().flatten(), (~short).nonzero().flatten())
    return tuple(_group(batch, starts, lengths, pick) for pick in picks if pick.numel() > 0)


def _group(batch: AttentionBatch, starts: Tensor, lengths: Tensor, pick: Tensor) -> QueryGroup:
    device = starts.device
    picked = lengths[pick]
    longest = int(picked.max())
    length = longest if longest <= SHORT_QUERY else BLOCK
    blocks = (picked + length - 1) // length
    row = torch.repeat_interleave(pick, blocks)
    first = torch.repeat_interleave(blocks.cumsum(0) - blocks, blocks)
    done = (torch.arange(row.shape[0], device=device) - first) * length
    offset = torch.arange(length, device=device)
    valid = offset < (lengths[row] - done)[:, None]
    # Padding repeats a block's first token, so that it widens no block's view.
    tokens = (starts[row] + done)[:, None] + torch.where(valid, offset, 0)
    positions = batch.positions[tokens]
    pages, where = batch.page_table[row].long(), batch.copies
    copies = () if where is None else (where.table[row].long(), where.count)
    return QueryGroup(tokens, valid, positions, pages, int(positions.max()) + 1, *copies)


def attend_group(q: Tensor, kv: Tensor, layer: AttentionLayer, group: QueryGroup) -> Tensor:
    """q: [blocks, length, heads, head_dim] of a group -> the same shape."""
    blocks, length, heads, head_dim = q.shape
    kv_heads = layer.num_kv_heads
    # Query heads that share a KV head become rows of one matrix product with its keys.
    grouped = q.view(blocks, length, kv_heads, heads // kv_heads, head_dim).transpose(1, 2)
    folded = grouped.reshape(blocks, kv_heads, -1, head_dim)
    positions = group.positions.repeat_interleave(heads // kv_heads, dim=1)
    if q.device.type == "cpu" and q.dtype != torch.float32:
        out = _attend_tiles_fused(folded, positions, kv, layer, group)
    else:
        out = _attend_tiles(folded, positions, kv, layer, group)
    out = out.view(blocks, kv_heads, length, heads // kv_heads, head_dim).transpose(1, 2)
    return out.reshape(blocks, length, heads, head_dim)


def _attend_tiles(
    q: Tensor, positions: Tensor, kv: Tensor, layer: AttentionLayer, group: QueryGroup
) -> Tensor:
    """q: [blocks, kv_heads, queries, head_dim] -> the same, in fp32 throughout.

    A query's result depends on its own row alone: the products have the same shape in their
    summed axes wherever the query stands, and hidden positions add exact zeros.
    """
    queries = q.shape[2]
    padding = -queries % EXACT_ROWS
    wide = F.pad(q.float() * layer.scale, (0, 0, 0, padding))
    positions = torch.cat([positions, positions[:, -1:].expand(-1, padding)], dim=1)
    best = wide.new_full(wide.shape[:-1], HIDDEN)
    total = torch.zeros_like(best)
    out = torch.zeros_like(wide)
    for part in tiles(positions, kv, layer, group, q.dtype, TILE, TILE):
        scores = torch.matmul(wide, part.keys.float().mT)
        scores.masked_fill_(~part.visible, -torch.inf)
        higher = torch.maximum(best, scores.amax(-1))
        weights = torch.exp(scores.sub_(higher[..., None]))
        decay = torch.exp(best - higher)
        total = total * decay + weights.sum(-1)
        out = out * decay[..., None] + torch.matmul(weights, part.values.float())
        best = higher
    return (out / total[..., None])[:, :, :queries].to(q.dtype)


def _attend_tiles_fused(
    q: Tensor, positions: Tensor, kv: Tensor, layer: AttentionLayer, group: QueryGroup
) -> Tensor:
    """As `_attend_tiles` for 16-bit floats on a CPU, each tile by torch's fused attention."""
    tile = FUSED_NUMBERS // (q.shape[0] * q.shape[1] * q.shape[3])
    tile = min(max(tile, FUSED_TILES[0]), FUSED_TILES[1], group.max_kv)
    parts = tiles(positions, kv, layer, group, q.dtype, tile, FUSED_TILES[0])
    out: Tensor | None = None
    best: Tensor | None = None
    for part in parts:
        mask = torch.zeros(part.visible.shape, dtype=torch.float32)
        mask.masked_fill_(~part.visible, HIDDEN)
        found, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, part.keys.to(q.dtype), part.values.to(q.dtype), attn_mask=mask, scale=layer.scale
        )
        if out is None or best is None:
            out, best = found, lse
            continue
        merged = torch.logaddexp(best, lse)
        out = out * torch.exp(best - merged)[..., None] + found * torch.exp(lse - merged)[..., None]
        best = merged
    assert out is not None
    return out.to(q.dtype)
