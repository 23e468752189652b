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
from worker.transfer import Transfer


@dataclass(frozen=True, slots=True)
class Samples:
    """The logits rows of a step, laid end to end for the rows that sample: 1 + drafts each.

    All tensors int64 and on the device.
    """

    rows: list[int]  # [sampling rows] index of each among the batch's rows
    starts: list[int]  # [sampling rows + 1]
    host_slots: list[int]  # [samples]
    slots: Tensor  # [samples], the same
    tokens: Tensor | None  # [samples] token rows to read out; None: every token row
    positions: Tensor  # [samples], the index the sampled token will occupy
    # Where there are drafts to judge, otherwise empty:
    row_slots: Tensor  # [sampling rows]
    row_of: Tensor  # [samples] index of each among the sampling rows
    first: Tensor  # [sampling rows] its first logits row
    last: Tensor  # [sampling rows] its last

    @property
    def drafted(self) -> bool:
        """Whether any row has drafts to judge."""
        return len(self.host_slots) > len(self.rows)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One forward: `tokens` token rows over `rows` sequences, some of them read out."""

    rows: tuple[Row, ...]
    row_slots: Tensor  # [rows] int64
    ids: Tensor  # [tokens] int64
    attention: AttentionBatch
    samples: Samples
    # Computed positions gained before any draft is accepted: [rows] int64, or the same for all.
    advance: Tensor | int


def build_batch(rows: Sequence[Row], slots: SlotTable, transfer: Transfer) -> StepBatch:
    """Lays the rows' tokens end to end and looks up where each stands.

    Writes the chunks into the token table, and pages added since the last step into the page
    table. A live row's position is read from the device's own arrays, never from the host, so this
    can run before the previous step's result is known there. All that the host knows is sent to
    the device in one copy, but for dense windows, whose pages are found by `SlotTable.bound` and
    told one by one; where there are any it must be exact.
    """
    device, page_size, windows = slots.tokens.device, slots.page_size, slots.windows
    counts: list[int] = []
    starts = [0]  # of the rows' tokens
    chunk_tokens: list[int] = []
    chunk_at: list[int] = []  # token rows the chunks' tokens stand at
    sampling: list[int] = []
    sample_at: list[int] = []  # token rows to read out
    sample_slots: list[int] = []
    sample_starts = [0]
    max_kv = 0
    for i, row in enumerate(rows):
        at, reads = starts[-1], 1 + row.drafts
        count = reads if row.chunk is None else len(row.chunk)
        counts.append(count)
        starts.append(at + count)
        if row.chunk is not None:
            chunk_tokens += row.chunk
            chunk_at += range(at, at + count)
        if row.samples:
            sampling.append(i)
            sample_at += range(at + count - reads, at + count)
            sample_slots += [row.slot] * reads
            sample_starts.append(len(sample_at))
        if windows is not None:
            windows.cover(row.slot, slots.bound[row.slot], slots.bound[row.slot] + count)
        slots.bound[row.slot] += count
        max_kv = max(max_kv, slots.bound[row.slot])
    total = starts[-1]
    plain = total == len(rows)  # a token each
    drafted = len(sample_at) > len(sampling)
    every = len(sample_at) == total

    sent = transfer.send(
        [row.slot for row in rows],
        [] if plain else counts,
        [] if plain else starts,
        [] if plain else [1 if row.chunk is None else len(row.chunk) for row in rows],
        chunk_tokens,
        [] if len(chunk_at) == total else chunk_at,
        [] if every else sample_at,
        [] if plain and every else sample_slots,
        [rows[i].slot for i in sampling] if drafted else [],
        _numbered(sample_starts) if drafted else [],
        sample_starts[:-1] if drafted else [],
        [end - 1 for end in sample_starts[1:]] if drafted else [],
        *slots.take_growth(),
    )
    row_slots, count_of_row, start_of_row, advance, chunk_ids, chunk_rows = sent[:6]
    sample_tokens, slot_of_sample, sampling_slots, row_of_sample, first, last = sent[6:12]
    slots.write_growth(*sent[12:])

    start = slots.computed[row_slots]
    if plain:
        token_rows = torch.arange(total, device=device)
        positions, token_slots = start, row_slots
        query_starts = torch.arange(total + 1, dtype=torch.int32, device=device)
        kv_lengths = start + 1
    else:
        token_rows = torch.repeat_interleave(count_of_row, output_size=total)
        positions = (start - start_of_row[:-1])[token_rows] + torch.arange(total, device=device)
        token_slots = row_slots[token_rows]
        query_starts = start_of_row.to(torch.int32)
        kv_lengths = start + count_of_row
    if chunk_tokens:
        values = chunk_ids.to(torch.int32)
        if len(chunk_tokens) == total:
            slots.tokens[token_slots, positions] = values
        else:
            slots.tokens[token_slots[chunk_rows], positions[chunk_rows]] = values
    pages = -(-max_kv // page_size)
    attention = AttentionBatch(
        positions=positions,
        token_rows=token_rows,
        query_starts=query_starts,
        kv_lengths=kv_lengths.to(torch.int32),
        page_table=slots.page_table[row_slots, :pages],
        kv_slots=slots.page_table[token_slots, positions // page_size].long() * page_size
        + positions % page_size,
        max_query=max(counts),
        max_kv=max_kv,
        copies=None if windows is None else windows.of(row_slots, token_slots, positions, pages),
    )
    return StepBatch(
        rows=tuple(rows),
        row_slots=row_slots,
        ids=slots.tokens[token_slots, positions].long(),
        attention=attention,
        samples=Samples(
            rows=sampling,
            starts=sample_starts,
            host_slots=sample_slots,
            slots=row_slots if plain and every else slot_of_sample,
            tokens=None if every else sample_tokens,
            positions=(positions if every else positions[sample_tokens]) + 1,
            row_slots=sampling_slots,
            row_of=row_of_sample,
            first=first,
            last=last,
        ),
        advance=1 if plain else advance,
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


def _numbered(starts: Sequence[int]) -> list[int]:
    """[0, 2, 5] -> [0, 0, 1, 1, 1]"""
    return [i for i in range(len(starts) - 1) for _ in range(starts[i], starts[i + 1])]
