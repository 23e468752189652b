"""What attention looks at: positions of a group's pages, a tile at a time.

Tiles start at multiples of their length counted from position 0, never from a row's or a chunk's
start: a token's arithmetic must not depend on how the prompt was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from kernels.kv import dense
from kernels.ops import AttentionLayer

Read = Callable[[Tensor], tuple[Tensor, Tensor]]  # pages [blocks, n] -> as `KVFormat.gather`


@dataclass(frozen=True, slots=True)
class QueryGroup:
    """Query blocks of one padded length, computed together.

    A block is a run of one row's tokens; a long chunk is several blocks over the same pages.
    """

    tokens: Tensor | None  # [blocks, length] int64 token rows; None: all tokens in their order
    valid: Tensor | None  # [blocks, length] bool; None: no padding
    positions: Tensor  # [blocks, length] int64
    pages: Tensor  # [blocks, pages] int64
    max_kv: int  # no block sees more positions
    # Where windows of packed pages are dense, as `pages`, and how many such pages there are.
    copies: Tensor | None = None
    num_copies: int = 0


@dataclass(frozen=True, slots=True)
class Tile:
    """Keys and values [blocks, kv_heads, n, head_dim] of one tile, and who sees them."""

    keys: Tensor
    values: Tensor
    visible: Tensor  # [blocks, 1, queries, n] bool


@dataclass(frozen=True, slots=True)
class _Pages:
    """Pages that hold some of the positions."""

    read: Read
    table: Tensor  # [blocks, pages] int64
    page_size: int
    tile: int  # positions


@dataclass(frozen=True, slots=True)
class _Span:
    """Of positions, those that each query sees."""

    first: Tensor | None  # [blocks, queries, 1]; None: from the first on
    end: Tensor  # behind the last, [blocks, queries, 1]
    limit: int  # no query sees so high a position
    reach: int | None = None  # no block of queries sees more positions; None: any number
    step: int = 1  # `first` is a multiple of it


def tiles(
    positions: Tensor,
    kv: Tensor,
    layer: AttentionLayer,
    group: QueryGroup,
    dtype: torch.dtype,
    tile: int,
    dense_tile: int,
) -> Iterator[Tile]:
    """All that a group has to look at: packed or dense pages in tiles of `tile` positions, then
    the dense windows, in tiles of `dense_tile`. `positions` of the queries, [blocks, queries]."""
    form, at = layer.kv, positions[..., None]
    page_size, queries = form.page_size(kv), group.positions.shape[1]
    oldest, reach = None, None
    if layer.window is not None:
        oldest, reach = at - layer.window + 1, layer.window + queries - 1
    pages = _Pages(lambda p: form.gather(kv, p), group.pages, page_size, tile)
    windows = form.windows
    if windows is None:
        yield from _walk(pages, _Span(oldest, at + 1, group.max_kv, reach))
        return

    assert group.copies is not None
    pool = form.dense(kv, group.num_copies, dtype)
    copies = _Pages(
        lambda p: dense.gather(pool, dense.page_rows(p, pool)), group.copies, page_size, dense_tile
    )
    recent = windows.recent(at)
    later = max(windows.begin(group.max_kv - 1), 0)  # no query's block begins so late
    sinks = windows.sink if oldest is None else oldest.clamp(min=windows.sink)
    first = torch.full_like(at, sinks) if isinstance(sinks, int) else sinks
    yield from _walk(pages, _Span(first, recent, later, reach))
    yield from _walk(
        copies, _Span(oldest, recent.clamp(max=windows.sink), min(windows.sink, later))
    )
    if windows.block:
        first, step = (recent, windows.block)
        if oldest is not None:
            first, step = torch.maximum(recent, oldest), 1
        reach = windows.block + queries - 1
        yield from _walk(copies, _Span(first, at + 1, group.max_kv, reach, step))


def _walk(pages: _Pages, span: _Span) -> Iterator[Tile]:
    """The tiles that hold a span, in the order of their positions."""
    table, page_size = pages.table, pages.page_size
    count = -(-pages.tile // page_size)  # pages of a tile
    tile = count * page_size
    needed = -(-min(table.shape[1] * page_size, span.limit) // tile)
    start: Tensor | None = None  # [blocks], each block's first tile
    if span.reach is not None and span.first is not None:
        # Blocks skip the tiles before what they see; those of one block that others still need are
        # hidden and change nothing.
        most = (span.reach + tile - gcd(span.step, tile) - 1) // tile + 1
        if most < needed:
            needed = most
            start = span.first.amin((1, 2)).clamp(min=0) // tile
    step = torch.arange(count, device=table.device)
    offset = torch.arange(page_size, device=table.device)
    # A last tile is filled up with whatever page comes last: those positions are after every
    # query's, and a tile of another size would be summed in another order.
    last = table.shape[1] - 1
    for i in range(needed):
        if start is None:
            page = i * count + step
            found = table[:, page.clamp(max=last)]
            keys_at = (page[:, None] * page_size + offset).view(1, 1, -1)
        else:
            page = ((start + i) * count)[:, None] + step
            found = table.gather(1, page.clamp(max=last))
            keys_at = (page[..., None] * page_size + offset).flatten(1)[:, None]
        visible = keys_at < span.end
        if span.first is not None:
            visible &= keys_at >= span.first
        keys, values = pages.read(found)
        yield Tile(keys, values, visible[:, None])
