"""Verification of drafts by sample-and-match (Daliri, Musco & Suresh 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Drafts:
    """What is judged: the logits rows of all sequences are laid end to end, at least one each."""

    # [n] integer, the draft each logits row judges. What stands at the last row of a sequence,
    # which has none to judge, is ignored.
    tokens: Tensor
    sequence: Tensor  # [n] int64, of each logits row
    first: Tensor  # [sequences] int64, the first logits row of each
    last: Tensor  # [sequences] int64


def longest_matches(sampled: Tensor, drafts: Drafts) -> Tensor:
    """How many drafts of each sequence the target's own samples confirm: the longest match.

    sampled: [n] int64. Returns [sequences] int64; the commit is that many samples and one more.
    """
    n = sampled.shape[0]
    at = torch.arange(n, device=sampled.device)
    # The last row of a sequence ends every match, so k = 0 needs no branch.
    goes_on = (sampled == drafts.tokens) & (at != drafts.last[drafts.sequence])
    stops = torch.where(goes_on, n, at)
    none = torch.full_like(drafts.first, n)
    return none.scatter_reduce_(0, drafts.sequence, stops, "amin") - drafts.first
