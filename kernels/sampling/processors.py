"""Logits processors: functions of a logits row, its parameters and its history, nothing else.

A row's history is `tokens[slot, :position]` of the token table; drafts before the row stand in it,
so a verified row sees exactly what a plain decode step would. `z` is float32 [rows, vocab], and
rows everywhere are its rows. The penalties return a new tensor; the others, which touch few
tokens, work in place. Nothing here synchronises with the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class History:
    """Tokens before each row. `tokens[:, position:]` is whatever stands there, and ignored."""

    tokens: Tensor  # [rows, width] int64; width >= every position
    position: Tensor  # [rows] int64
    prompt_len: Tensor  # [rows] int64; from here on, tokens are output

    def occurrences(self, vocab: int, *, output_only: bool) -> Tensor:
        """How often each token stands in the history: [rows, vocab] float32."""
        at = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        counted = at < self.position[:, None]
        if output_only:
            counted &= at >= self.prompt_len[:, None]
        counts = torch.zeros(len(self.tokens), vocab, device=self.tokens.device)
        # Sums of ones are exact in float32, so the order of the additions does not matter.
        return counts.scatter_add_(1, self.tokens, counted.to(torch.float32))


def repetition_penalty(z: Tensor, history: History, penalty: Tensor) -> Tensor:
    """Keskar et al. 2019: seen tokens, prompt included, have their logit divided by `penalty` when
    positive and multiplied when not. penalty: [rows] float32."""
    seen = history.occurrences(z.shape[1], output_only=False) > 0
    by = penalty[:, None]
    return torch.where(seen, torch.where(z > 0, z / by, z * by), z)


def count_penalties(z: Tensor, history: History, frequency: Tensor, presence: Tensor) -> Tensor:
    """OpenAI's penalties over the output: `frequency` for each occurrence, `presence` once.

    frequency, presence: [rows] float32.
    """
    counts = history.occurrences(z.shape[1], output_only=True)
    return z - frequency[:, None] * counts - presence[:, None] * (counts > 0)


def add_bias(z: Tensor, rows: Tensor, ids: Tensor, bias: Tensor) -> None:
    """z[rows, ids] += bias. rows, ids: [m] int64, no pair twice; bias: [m] float32."""
    z[rows, ids] += bias


def allow_only(z: Tensor, rows: Tensor, row_of_id: Tensor, ids: Tensor) -> None:
    """Masks all but the allowed tokens of `rows`. rows: [r]; row_of_id, ids: [m] int64."""
    kept = z[row_of_id, ids]
    z.index_fill_(0, rows, -torch.inf)
    z[row_of_id, ids] = kept


def ban(z: Tensor, rows: Tensor, ids: Tensor, active: Tensor) -> None:
    """z[rows, ids] = -inf where active. rows, ids: [m] int64, active: [m] bool; a pair may stand
    several times and is banned if any of them is active."""
    flat = rows * z.shape[1] + ids
    limit = torch.where(active, -torch.inf, torch.inf)
    z.view(-1).scatter_reduce_(0, flat, limit, "amin")


def ends_with(history: History, rows: Tensor, prefixes: Tensor) -> Tensor:
    """Whether each row's history ends with a given sequence.

    rows: [m] int64; prefixes: [m, length] int64, aligned right, -1 on the left where a sequence
    is shorter. Returns [m] bool; the empty sequence ends every history.
    """
    length = prefixes.shape[1]
    at = history.position[rows, None] + torch.arange(-length, 0, device=rows.device)
    before = history.tokens[rows[:, None], at.clamp(min=0)]
    return ((prefixes < 0) | ((before == prefixes) & (at >= 0))).all(-1)
