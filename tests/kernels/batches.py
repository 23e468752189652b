"""Random ragged steps over shuffled pages, for tests of anything that takes an `AttentionBatch`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kernels.kv.windows import DensePages
from kernels.ops import AttentionBatch


def demote(kv: Tensor, table: Tensor, share: float, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Demotes some pages of a table, in pairs that share a page, and writes over what that frees.

    kv: [pages, bytes]; table: [rows, pages], of which no two entries are the same page. Returns
    another pool and table.
    """
    kv, table = kv.clone(), table.clone()
    halves = kv.view(2 * kv.shape[0], -1)
    places = [place for place in table.nonzero().tolist() if rng.random() < share]
    rng.shuffle(places)
    for stays, goes in zip(places[::2], places[1::2], strict=False):
        page, other = int(table[tuple(stays)]), int(table[tuple(goes)])
        halves[2 * page + 1] = halves[2 * other]
        kv[other] = 255
        table[tuple(stays)], table[tuple(goes)] = ~(2 * page), ~(2 * page + 1)
    return kv, table


@dataclass
class Rows:
    """Sequences with their pages, from which steps are cut. Page 0 stays the null page."""

    page_size: int
    page_table: Tensor  # [rows, pages] int32

    @classmethod
    def shuffled(cls, lengths: Sequence[int], page_size: int, generator: torch.Generator) -> Rows:
        """Pages for sequences of up to `lengths` positions, in random order."""
        counts = [-(-length // page_size) for length in lengths]
        pages = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        at = 0
        for row, count in enumerate(counts):
            table[row, :count] = torch.tensor(pages[at : at + count], dtype=torch.int32)
            at += count
        return cls(page_size, table)

    @property
    def num_pages(self) -> int:
        """Of the pool, the null page included."""
        return int(self.page_table.max()) + 1

    def step(self, spans: Sequence[tuple[int, int, int]]) -> AttentionBatch:
        """spans: (row, first position, position behind the last) of each row in the step."""
        counts = [stop - start for _, start, stop in spans]
        positions = torch.cat([torch.arange(start, stop) for _, start, stop in spans])
        token_rows = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor(counts))
        table = self.page_table[[row for row, _, _ in spans]]
        max_kv = max(stop for _, _, stop in spans)
        pages = table[token_rows, positions // self.page_size].long()
        return AttentionBatch(
            positions=positions,
            token_rows=token_rows,
            query_starts=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32),
            kv_lengths=torch.tensor([stop for _, _, stop in spans], dtype=torch.int32),
            page_table=table[:, : -(-max_kv // self.page_size)],
            kv_slots=pages * self.page_size + positions % self.page_size,
            max_query=max(counts),
            max_kv=max_kv,
            copies=self._copies(spans, positions, token_rows, max_kv),
        )

    def _copies(
        self,
        spans: Sequence[tuple[int, int, int]],
        positions: Tensor,
        token_rows: Tensor,
        max_kv: int,
    ) -> DensePages:
        """Dense copies of every position, on the pages counted from behind."""
        whole = torch.where(self.page_table > 0, self.num_pages - self.page_table, 0).int()
        table, size = whole[[row for row, _, _ in spans]], self.page_size
        pages = table[token_rows, positions // size].long()
        slots = pages * size + positions % size
        return DensePages(table[:, : -(-max_kv // size)].contiguous(), slots, self.num_pages)


def moved(batch: AttentionBatch, device: str) -> AttentionBatch:
    """All its tensors there."""
    values = ((field.name, getattr(batch, field.name)) for field in fields(batch))
    tensors = {name: value.to(device) for name, value in values if isinstance(value, Tensor)}
    copies = batch.copies
    if copies is not None:
        copies = DensePages(copies.table.to(device), copies.slots.to(device), copies.count)
    return replace(batch, **tensors, copies=copies)
