"""From positions of several sequences to the tensors of one forward of a draft model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.ops import AttentionBatch
from kernels.sampling.upload import send
from worker.slots import SlotTable

Span = tuple[int, int, int]  # a slot, and positions from the first to before the last


class Moved(NamedTuple):
    """Pages that stand in place of some of a slot's."""

    first: int  # of the slot's pages, by number
    pages: tuple[int, ...]


def span_batch(
    slots: SlotTable, spans: Sequence[Span], more: int = 0, moved: Sequence[Moved | None] = ()
) -> AttentionBatch:
    """One ragged forward over known positions; the page table reaches `more` positions further.
    `moved`: of each span, if of any. Does not wait for the device."""
    device, size = slots.tokens.device, slots.page_size
    table = np.array(spans, dtype=np.int64)
    row_slots, lengths = table[:, 0], table[:, 2]
    counts = lengths - table[:, 1]
    starts = np.zeros(len(spans) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    rows = np.repeat(np.arange(len(spans)), counts)
    positions = np.arange(starts[-1]) + (table[:, 1] - starts[:-1])[rows]
    longest = int(lengths.max())
    pages = slots.host_table[row_slots, : -(-(longest + more) // size)]
    for row, elsewhere in enumerate(moved):
        if elsewhere is not None:
            first, put = elsewhere
            pages[row, first : first + len(put)] = put[: max(pages.shape[1] - first, 0)]

    def on_device(values: np.ndarray) -> Tensor:
        return send(torch.from_numpy(values), device)

    return AttentionBatch(
        positions=on_device(positions),
        token_rows=on_device(rows),
        query_starts=on_device(starts),
        kv_lengths=on_device(lengths.astype(np.int32)),
        page_table=on_device(pages),
        kv_slots=on_device(
            pages[rows, positions // size].astype(np.int64) * size + positions % size
        ),
        max_query=int(counts.max()),
        max_kv=longest,
    )


def last_batch(lengths: Tensor, page_table: Tensor, page_size: int, longest: int) -> AttentionBatch:
    """One forward over the last position of each row. lengths: [rows] int64, on the device;
    page_table: [rows, pages] int32; longest: no length exceeds it. Does not wait for the device."""
    count, positions = lengths.shape[0], lengths - 1
    rows = torch.arange(count, device=lengths.device)
    page_table = page_table[:, : -(-longest // page_size)]
    return AttentionBatch(
        positions=positions,
        token_rows=rows,
        query_starts=torch.arange(count + 1, dtype=torch.int32, device=lengths.device),
        kv_lengths=lengths.to(torch.int32),
        page_table=page_table,
        kv_slots=page_table[rows, positions // page_size].long() * page_size
        + positions % page_size,
        max_query=1,
        max_kv=longest,
    )
