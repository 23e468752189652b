"""The rules that are compared with coupled noise, by enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from benchmarks.verification import accepted_by_block, accepted_by_token, block_chances

VOCAB = 3


def models(seed: int) -> tuple[Tensor, Tensor]:
    """Distributions after nothing and after each token: [1 + VOCAB, VOCAB], of target and draft."""
    g = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 1 + VOCAB, VOCAB, generator=g, dtype=torch.float64).mul(1.5).softmax(-1)
    return p, q


def of_path(model: Tensor, path: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Probabilities of the two drafts, and what may follow each prefix of them."""
    first, second = path
    chances = torch.stack([model[0, first], model[1 + first, second]])
    return chances, torch.stack([model[1 + first], model[1 + second]])


@pytest.mark.parametrize("seed", range(30))
def test_block_verification_is_exact_and_never_accepts_fewer(seed: int) -> None:
    p, q = models(seed)
    first_token = torch.zeros(VOCAB, dtype=torch.float64)
    block = token = 0.0
    refused = (p[0] - q[0]).clamp(min=0.0)
    for path in itertools.product(range(VOCAB), repeat=2):
        (p_of, after_p), (q_of, after_q) = of_path(p, path), of_path(q, path)
        drawn = float(q_of.prod())
        some = 1.0
        for chance in block_chances(p_of, q_of, after_p, after_q):
            some *= 1.0 - chance
        first_token[path[0]] += drawn * (1.0 - some)
        first_token += drawn * some * refused / refused.sum()
        block += drawn * accepted_by_block(p_of, q_of, after_p, after_q)
        token += drawn * accepted_by_token(p_of, q_of)
    torch.testing.assert_close(first_token, p[0])
    assert block >= token - 1e-12


def test_one_draft_is_one_draft() -> None:
    p, q = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    unread = torch.zeros(1, 2, dtype=torch.float64)
    assert accepted_by_block(p, q, unread, unread) == pytest.approx(0.6)
    assert accepted_by_token(p, q) == pytest.approx(0.6)
