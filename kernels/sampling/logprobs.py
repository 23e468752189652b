"""Log-probabilities of the raw model distribution, before any processing (OpenAI's meaning)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """One entry per logits row. A masked logit (-inf) has log-probability -inf."""

    logprob: Tensor  # [rows] float32, of the given token
    rank: Tensor  # [rows] int64, its place in the order of `top_ids`; 1 is the most likely
    top_ids: Tensor  # [rows, n] int64, most likely first, the lower id first among equals
    top_logprobs: Tensor  # [rows, n] float32


def row_logprobs(logits: Tensor, tokens: Tensor, n: int) -> RowLogprobs:
    """logits: [rows, vocab] float32; tokens: [rows] int64; n is capped at the vocabulary."""
    vocab = logits.shape[1]
    n = min(n, vocab)
    # One total order without ties: the float's bits as a sortable integer (adding 0 turns -0 into
    # +0, which equals it), then the id. A NaN row gets some order, and its logprobs are NaN.
    bits = (logits + 0.0).view(torch.int32).long()
    ids = torch.arange(vocab, device=logits.device)
    order = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32) + (vocab - 1 - ids)
    rank = (order > order.gather(1, tokens[:, None])).sum(1) + 1
    top_ids = (vocab - 1) - (order.topk(n, dim=1).values & 0xFFFFFFFF)
    logprobs = logits.log_softmax(-1)
    return RowLogprobs(
        logprob=logprobs.gather(1, tokens[:, None]).squeeze(1),
        rank=rank,
        top_ids=top_ids,
        top_logprobs=logprobs.gather(1, top_ids),
    )
