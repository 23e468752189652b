"""Log-probabilities of the raw distribution."""

import math

import pytest
import torch

from kernels.sampling.logprobs import row_logprobs


def test_against_sorting_in_float64():
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, 300, generator=generator) * 4).round() / 2  # with many ties
    logits[1, :40] = -math.inf
    logits[2, 7] = -0.0
    tokens = torch.randint(0, 300, (5,), generator=generator)
    tokens[1] = 3
    found = row_logprobs(logits, tokens, 6)
    exact = logits.double().log_softmax(-1)
    for row in range(5):
        order = sorted(range(300), key=lambda t: (-float(logits[row, t]), t))
        token = int(tokens[row])
        assert found.top_ids[row].tolist() == order[:6]
        likelier = int((logits[row] > logits[row, token]).sum())
        assert int(found.rank[row]) == 1 + likelier
        assert float(found.logprob[row]) == pytest.approx(float(exact[row, token]), abs=1e-5)
        expected = exact[row, order[:6]].tolist()
        assert found.top_logprobs[row].tolist() == pytest.approx(expected, abs=1e-5)
    assert float(found.logprob[1]) == -math.inf


def test_padding_is_never_among_the_top():
    """Where masked tokens are listed, they come before the padding of the last tile, which equals
    them."""
    logits = torch.full((1, 33), -math.inf)
    logits[0, 32] = 1.0
    found = row_logprobs(logits, torch.tensor([32]), 33)
    assert found.top_ids.tolist() == [[32, *range(32)]]


def test_more_than_there_are():
    found = row_logprobs(torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([2]), 20)
    assert found.top_ids.tolist() == [[1, 0, 2]]
    assert found.top_logprobs[0, 2] == -math.inf
    assert int(found.rank[0]) == 3


def test_none_wanted():
    found = row_logprobs(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 0)
    assert found.top_ids.shape == (1, 0)
    assert int(found.rank[0]) == 2
