"""Log-probabilities of the raw model distribution, before any processing (OpenAI's meaning)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

_TILE = 32  # tokens


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """One entry per logits row. A masked logit (-inf) has log-probability -inf."""

    logprob: Tensor  # [rows] float32, of the given token
    rank: Tensor  # [rows] int64, 1 + the number of tokens more likely than the given one
    top_ids: Tensor  # [rows, n] int64, most likely first, the lower id first among equals
    top_logprobs: Tensor  # [rows, n] float32


def row_logprobs(logits: Tensor, tokens: Tensor, n: int) -> RowLogprobs:
    """logits: [rows, vocab] float32; tokens: [rows] int64; n is capped at the vocabulary.

    Does not synchronise with the host.
    """
    own = tokens[:, None]
    logprobs = logits.log_softmax(-1)
    top_ids = _top(logits, min(n, logits.shape[1]))
    return RowLogprobs(
        logprob=logprobs.gather(1, own).squeeze(1),
        rank=(logits > logits.gather(1, own)).sum(1) + 1,
        top_ids=top_ids,
        top_logprobs=logprobs.gather(1, top_ids),
    )


def _top(logits: Tensor, n: int) -> Tensor:
    """Ids of each row's n most likely tokens, the lower id first among equals: [rows, n]."""
    rows, vocab = logits.shape
    if n == 0:
        return torch.empty(rows, 0, dtype=torch.int64, device=logits.device)
    tiles = pad(logits, (0, -vocab % _TILE), value=-torch.inf).view(rows, -1, _TILE)
    # Whatever is among the n first lies in one of the n tiles whose best tokens come first.
    some = min(n, tiles.shape[1])
    tile = _first(tiles.amax(-1), some)
    values = tiles.gather(1, tile[..., None].expand(-1, -1, _TILE))
    ids = (tile * _TILE)[..., None] + torch.arange(_TILE, device=logits.device)
    in_order = ids.flatten(1).sort(1)
    values = values.flatten(1).gather(1, in_order.indices)
    return in_order.values.gather(1, _first(values, n))


def _first(values: Tensor, n: int) -> Tensor:
    """Places of the n largest of each row, the lower place first among equals: [rows, n].

    `topk` leaves the order of equals open, so it gets keys that are never equal: the float's bits
    as a sortable integer (adding 0 turns -0 into +0, which equals it), then the place. A NaN row
    comes in some order.
    """
    places = values.shape[1]
    bits = (values + 0.0).view(torch.int32).long()
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32
    keys += torch.arange(places - 1, -1, -1, device=values.device)
    return (places - 1) - (keys.topk(n, dim=1).values & 0xFFFFFFFF)
