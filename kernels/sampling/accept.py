"""Verification of drafts by sample-and-match (Daliri, Musco & Suresh 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kernels.sampling.upload import upload


def accepted_counts(sampled: Tensor, drafts: Tensor, row_starts: Sequence[int]) -> Tensor:
    """How many drafts of each sequence the target's own samples confirm: the longest match.

    sampled: [n] int64, the samples of all sequences' logits rows, laid end to end; sequence r has
    rows `row_starts[r]` to `row_starts[r + 1] - 1`, at least one. drafts: [n] integer, the draft
    each logits row judges; what stands at the last row of a sequence, which has none to judge, is
    ignored. Returns [sequences] int64; the commit is that many samples and one more.
    """
    spans = list(pairwise(row_starts))
    device = sampled.device
    row = upload([r for r, (start, end) in enumerate(spans) for _ in range(start, end)], device)
    start = upload([start for start, _ in spans], device)
    last = upload([end - 1 for _, end in spans], device)
    return longest_matches(sampled, drafts, row, start, last)


def longest_matches(
    sampled: Tensor, drafts: Tensor, row: Tensor, first: Tensor, last: Tensor
) -> Tensor:
    """As `accepted_counts`, with what follows from the starts already on the device: `row` [n]
    int64, the sequence of each logits row, `first` and `last` [sequences] int64, its first and last
    one."""
    n = sampled.shape[0]
    at = torch.arange(n, device=sampled.device)
    # The last row of a sequence ends every match, so k = 0 needs no branch.
    stops = torch.where((sampled == drafts) & (at != last[row]), n, at)
    return torch.full_like(first, n).scatter_reduce_(0, row, stops, "amin") - first
