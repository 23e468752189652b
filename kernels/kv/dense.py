"""The dense KV layout: pages of [2, kv_heads, page_size, head_dim], keys first."""

from __future__ import annotations

import torch
from torch import Tensor


def append_reference(k: Tensor, v: Tensor, kv: Tensor, kv_slots: Tensor) -> None:
    """The specification: token by token.

    k, v: [tokens, kv_heads, head_dim]; kv: [pages, 2, kv_heads, page_size, head_dim], written in
    place; kv_slots: [tokens], page * page_size + offset.
    """
    page_size = kv.shape[3]
    for i, slot in enumerate(kv_slots.tolist()):
        page, offset = divmod(slot, page_size)
        kv[page, 0, :, offset] = k[i].to(kv.dtype)
        kv[page, 1, :, offset] = v[i].to(kv.dtype)


def append(k: Tensor, v: Tensor, kv: Tensor, kv_slots: Tensor) -> None:
    """As `append_reference`, in two scatters and without reading anything back."""
    page_size = kv.shape[3]
    pages = torch.div(kv_slots, page_size, rounding_mode="floor")
    offsets = kv_slots - pages * page_size
    by_position = kv.permute(1, 0, 3, 2, 4)  # [2, pages, page_size, kv_heads, head_dim]
    by_position[0, pages, offsets] = k.to(kv.dtype)
    by_position[1, pages, offsets] = v.to(kv.dtype)


def page_rows(page_table: Tensor, kv: Tensor) -> Tensor:
    """Where each page's keys lie, head by head, for `gather`.

    page_table: [rows, pages] -> [rows, kv_heads, pages] int64, in units of one page of one head.
    """
    heads = kv.shape[2]
    head = torch.arange(heads, device=kv.device)[:, None]
    return page_table.long()[:, None] * (2 * heads) + head


def gather(kv: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Copies the pages out so that a row's positions lie one behind the other.

    rows: [rows, kv_heads, pages] of `page_rows` -> keys and values, each
    [rows, kv_heads, pages * page_size, head_dim].
    """
    _, _, heads, page_size, head_dim = kv.shape
    units = kv.view(-1, page_size * head_dim)
    count, _, pages = rows.shape
    shape = (count, heads, pages * page_size, head_dim)
    flat = rows.reshape(-1)
    keys = units.index_select(0, flat).view(shape)
    return keys, units.index_select(0, flat + heads).view(shape)


def behind(
    kv: Tensor, count: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype
) -> Tensor:
    """The `count` dense pages that lie behind all others of a pool of bytes, [pages, bytes]."""
    shape = torch.Size((count, 2, kv_heads, page_size, head_dim))
    size = shape.numel() * dtype.itemsize
    rows = -(-size // kv.shape[1])
    return kv[kv.shape[0] - rows :].view(-1)[:size].view(dtype).view(shape)
