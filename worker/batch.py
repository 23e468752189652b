"""From the rows of a plan to the tensors of one ragged forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.ops import AttentionBatch
from scheduler.plan import Row
from worker.drafters.spans import span_batch
from worker.slots import SlotTable


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One forward: `tokens` token rows over `rows` sequences, `samples` of them read out."""

    rows: tuple[Row, ...]
    row_slots: Tensor  # [rows] int64
    ids: Tensor  # [tokens] int64
    attention: AttentionBatch
    # Logits rows, laid end to end for the rows that sample: 1 + drafts each.
    sample_tokens: Tensor | None  # [samples] int64 token rows to read out; None: every token row
    sample_slots: list[int]  # [samples] slot of each logits row
    sample_positions: Tensor  # [samples] int64, the index the sampled token will occupy
    sample_starts: list[int]  # [sampling rows + 1]
    advance: Tensor  # [rows] int64, computed positions gained before any draft is accepted


def build_batch(rows: Sequence[Row], slots: SlotTable) -> StepBatch:
    """Lays the rows' tokens end to end and looks up where each stands.

    Writes the chunks into the token table. A live row's position is read from the device's own
    arrays, never from the host, so this can run before the previous step's result is known there.
    """
    device = slots.tokens.device
    counts = [1 + row.drafts if row.chunk is None else len(row.chunk) for row in rows]
    row_slots = torch.tensor([row.slot for row in rows], device=device)
    start = slots.computed[row_slots]
    total = sum(counts)
    if total == len(rows):
        token_rows = torch.arange(total, device=device)
        positions, token_slots = start, row_slots
        query_starts = torch.arange(total + 1, dtype=torch.int32, device=device)
    else:
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        count_of_row = torch.tensor(counts, device=device)
        query_starts = torch.tensor(starts, dtype=torch.int32, device=device)
        token_rows = torch.repeat_interleave(count_of_row, output_size=total)
        offsets = torch.arange(total, device=device) - query_starts[token_rows]
        positions = start[token_rows] + offsets
        token_slots = row_slots[token_rows]

    windows = slots.windows
    chunk_tokens: list[int] = []
    chunk_at: list[int] = []  # token rows the chunks' tokens stand at
    max_kv = 0
    at = 0
    for row, count in zip(rows, counts, strict=True):
        if row.chunk is not None:
            chunk_tokens.extend(row.chunk)
            chunk_at.extend(range(at, at + count))
        at += count
        if windows is not None:
            windows.cover(row.slot, slots.bound[row.slot], slots.bound[row.slot] + count)
        slots.bound[row.slot] += count
        max_kv = max(max_kv, slots.bound[row.slot])
    if chunk_tokens:
        values = torch.tensor(chunk_tokens, dtype=torch.int32, device=device)
        if len(chunk_tokens) == total:
            slots.tokens[token_slots, positions] = values
        else:
            at_rows = torch.tensor(chunk_at, device=device)
            slots.tokens[token_slots[at_rows], positions[at_rows]] = values

    page_size = slots.page_size
    kv_slots = (
        slots.page_table[token_slots, positions // page_size].long() * page_size
        + positions % page_size
    )
    pages = -(-max_kv // page_size)
    attention = AttentionBatch(
        positions=positions,
        token_rows=token_rows,
        query_starts=query_starts,
        kv_lengths=(start + (1 if total == len(rows) else count_of_row)).to(torch.int32),
        page_table=slots.page_table[row_slots, :pages],
        kv_slots=kv_slots,
        max_query=max(counts),
        max_kv=max_kv,
        copies=None if windows is None else windows.of(row_slots, token_slots, positions, pages),
    )

    sample_at: list[int] = []
    sample_slots: list[int] = []
    sample_starts = [0]
    at = 0
    for row, count in zip(rows, counts, strict=True):
        at += count
        if row.samples:
            read = 1 + row.drafts
            sample_at.extend(range(at - read, at))
            sample_slots.extend([row.slot] * read)
            sample_starts.append(len(sample_at))
    every = len(sample_at) == total
    sample_tokens = None if every else torch.tensor(sample_at, dtype=torch.int64, device=device)
    return StepBatch(
        rows=tuple(rows),
        row_slots=row_slots,
        ids=slots.tokens[token_slots, positions].long(),
        attention=attention,
        sample_tokens=sample_tokens,
        sample_slots=sample_slots,
        sample_positions=(positions if sample_tokens is None else positions[sample_tokens]) + 1,
        sample_starts=sample_starts,
        advance=torch.tensor(
            [1 if row.chunk is None else len(row.chunk) for row in rows], device=device
        ),
    )


def sink_batch(slots: SlotTable, ends: Sequence[tuple[int, int]]) -> tuple[Tensor, AttentionBatch]:
    """The first positions of slots, (slot, behind the last) each, whose packed pages the pool has.

    Returns token ids, [tokens] int64, and a step that writes dense copies only.
    """
    windows = slots.windows
    assert windows is not None
    for slot, end in ends:
        windows.cover(slot, 0, end)
    batch = span_batch(slots, [(slot, 0, end) for slot, end in ends])
    at = batch.positions
    row_slots = torch.tensor([slot for slot, _ in ends], device=at.device)
    token_slots = row_slots[batch.token_rows]
    pages = batch.page_table.shape[1]
    null = at % slots.page_size  # in page 0
    copies = windows.of(row_slots, token_slots, at, pages)
    return slots.tokens[token_slots, at].long(), replace(batch, kv_slots=null, copies=copies)
