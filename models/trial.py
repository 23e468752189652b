"""Two short sequences through paged KV: what a model is tried on when it is loaded.

The first is cut into two chunks, the second runs beside the second chunk, and the pages lie in no
order. Whatever carries state from token to token other than through the pages, or mixes rows,
gives other logits than one pass over each sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.ops import AttentionBatch
from models.spec import ModelSpec

LENGTHS = (20, 9)
CUT = 13
PAGE_SIZE = 8
TABLES = ((3, 6, 1), (4, 2, 5))


def trial_sequences(vocab_size: int) -> list[Tensor]:
    """The sequences' token ids, [length] int64 each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in LENGTHS]


def run_trial(
    run: Callable[[Tensor, AttentionBatch, Sequence[Tensor]], Tensor],
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """run(ids, batch, kv) -> logits [tokens, vocab]. Returns each sequence's logits, in order."""
    ids = [each.to(device) for each in trial_sequences(spec.vocab_size)]
    size = (8, 2, spec.num_kv_heads, PAGE_SIZE, spec.head_dim)
    kv = [torch.zeros(size, dtype=dtype, device=device) for _ in range(spec.num_layers)]
    tables = torch.tensor(TABLES, dtype=torch.int32, device=device)
    first, second = LENGTHS
    found: list[list[Tensor]] = [[], []]
    for spans in ([(0, 0, CUT)], [(0, CUT, first), (1, 0, second)]):
        tokens = torch.cat([ids[row][start:stop] for row, start, stop in spans])
        logits = run(tokens, _batch(tables, spans), kv)
        counts = [stop - start for _, start, stop in spans]
        for (row, _, _), part in zip(spans, logits.split(counts), strict=True):
            found[row].append(part)
    return [torch.cat(parts) for parts in found]


def _batch(tables: Tensor, spans: Sequence[tuple[int, int, int]]) -> AttentionBatch:
    """spans: (row of `tables`, first position, behind the last)."""
    device = tables.device
    counts = torch.tensor([stop - start for _, start, stop in spans], device=device)
    positions = torch.cat([torch.arange(a, b, device=device) for _, a, b in spans])
    rows = torch.repeat_interleave(torch.arange(len(spans), device=device), counts)
    table = tables[[row for row, _, _ in spans]]
    pages = table[rows, positions // PAGE_SIZE].long()
    lengths = [stop for _, _, stop in spans]
    return AttentionBatch(
        positions=positions,
        token_rows=rows,
        query_starts=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
        kv_lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        page_table=table,
        kv_slots=pages * PAGE_SIZE + positions % PAGE_SIZE,
        max_query=int(counts.max()),
        max_kv=max(lengths),
    )
