"""Random ragged steps over permuted pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import AttentionBatch, AttentionLayer


@dataclass(frozen=True, slots=True)
class Shape:
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    page_size: int = 16
    window: int | None = None

    def layer(self, cos_sin: Tensor | None = None, norms: Tensor | None = None) -> AttentionLayer:
        return AttentionLayer(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            cos_sin=cos_sin,
            q_norm=None if norms is None else norms[0],
            k_norm=None if norms is None else norms[1],
            window=self.window,
        )


def make_batch(
    rows: list[tuple[int, int]], page_size: int, generator: torch.Generator
) -> tuple[AttentionBatch, int]:
    """rows: (positions before this step, tokens of this step). Returns the batch and page count."""
    lengths = [before + tokens for before, tokens in rows]
    needed = [-(-length // page_size) for length in lengths]
    pages = 1 + sum(needed)
    order = torch.randperm(pages - 1, generator=generator).int() + 1
    table = torch.zeros(len(rows), max(needed), dtype=torch.int32)
    for row, pick in enumerate(order.split(needed)):
        table[row, : len(pick)] = pick
    positions = torch.cat([torch.arange(b, b + t) for b, t in rows])
    token_rows = torch.cat([torch.full((t,), i) for i, (_, t) in enumerate(rows)])
    starts = torch.tensor([0, *[t for _, t in rows]]).cumsum(0).int()
    slots = table[token_rows, positions // page_size].long() * page_size + positions % page_size
    batch = AttentionBatch(
        positions=positions,
        token_rows=token_rows,
        query_starts=starts,
        kv_lengths=torch.tensor(lengths, dtype=torch.int32),
        page_table=table,
        kv_slots=slots,
        max_query=max(t for _, t in rows),
        max_kv=max(lengths),
    )
    return batch, pages


def only(batch: AttentionBatch, row: int, begin: int, end: int) -> AttentionBatch:
    """The step of one row's tokens [begin, end) alone."""
    first = int(batch.query_starts[row])
    pick = slice(first + begin, first + end)
    last = int(batch.positions[pick][-1])
    return AttentionBatch(
        positions=batch.positions[pick].clone(),
        token_rows=torch.zeros(end - begin, dtype=torch.int64),
        query_starts=torch.tensor([0, end - begin], dtype=torch.int32),
        kv_lengths=torch.tensor([last + 1], dtype=torch.int32),
        page_table=batch.page_table[row : row + 1].clone(),
        kv_slots=batch.kv_slots[pick].clone(),
        max_query=end - begin,
        max_kv=last + 1,
    )
