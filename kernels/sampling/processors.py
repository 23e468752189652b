"""Logits processors: functions of a logits row, its parameters and its history, nothing else.

A row's history is `tokens[slot, :position]` of the token table; drafts before the row stand in it,
so a verified row sees exactly what a plain decode step would. `z` is float32 [rows, vocab] and
changed in place; rows everywhere are its rows. Nothing here synchronises with the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class History:
    """Tokens before each row: `table[slot, :position]`."""

    table: Tensor  # [slots, width] int32, the token table
    slot: Tensor  # [rows] int64
    position: Tensor  # [rows] int64, at least 1 and at most `width`
    prompt_len: Tensor  # [rows] int64; from here on, tokens are output

    def tokens(self) -> Tensor:
        """[rows, at least the longest history] int64; what follows a row's history is anything."""
        width = self.table.shape[1]
        if self.table.device.type == "cpu":  # reading a length back is free here
            width = int(self.position.max())
        return self.table[self.slot, :width].long()


@dataclass(frozen=True, slots=True)
class Penalties:
    """One entry a row; the neutral values are 1, 0 and 0."""

    repetition: Tensor  # [rows] float32 > 0
    frequency: Tensor  # [rows] float32
    presence: Tensor  # [rows] float32


def penalize(z: Tensor, rows: Tensor | None, history: History, by: Penalties) -> None:
    """The three penalties, in this order, on some rows of z, [m] int64, or on all.

    - repetition (Keskar et al. 2019): tokens of the prompt and the output have their logit divided
      by it when positive and multiplied when not;
    - frequency (OpenAI): subtracted for each occurrence in the output;
    - presence (OpenAI): subtracted once from tokens of the output.
    """
    part = z if rows is None else z[rows]
    tokens = history.tokens()
    at = torch.arange(tokens.shape[1], device=z.device)
    known = at < history.position[:, None]
    # Only tokens of the history change, so only they are read and written. Places past its end
    # repeat its first token: every writer of a token then writes the same value.
    ids = torch.where(known, tokens, tokens[:, :1])
    output = known & (at >= history.prompt_len[:, None])
    # Sums of ones are exact in float32, so the order of the additions does not matter.
    counts = torch.zeros_like(part).scatter_add_(1, ids, output.to(z.dtype)).gather(1, ids)
    seen = part.gather(1, ids)
    repetition = by.repetition[:, None]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen -= by.frequency[:, None] * counts
    seen -= by.presence[:, None] * (counts > 0)
    part.scatter_(1, ids, seen)
    if rows is not None:
        z[rows] = part


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
    before = history.table[history.slot[rows, None], at.clamp(min=0)]
    return ((prefixes < 0) | ((before == prefixes) & (at >= 0))).all(-1)
