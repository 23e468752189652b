"""Drawing a token: the CPU form against the specification, the specification against softmax."""

import math

import pytest
import torch
from hypothesis import given, settings

from kernels.sampling import pruned, reference
from kernels.sampling.philox import GUMBEL_SPAN
from kernels.sampling.reference import Draws, NoiseKey
from tests.kernels.sampling.cases import (
    SOME_LIMITS,
    check_bad_rows,
    check_batch_independence,
    check_reference,
    chi_square,
    draws,
    make_key,
    make_limits,
)
from worker.sampler import Form

FORMS = pytest.mark.parametrize("form", [reference, pruned], ids=["reference", "pruned"])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(draws)
def test_pruned_draws_what_the_reference_draws(draw: dict):
    check_reference(pruned, **draw)


@FORMS
@pytest.mark.parametrize("limits", SOME_LIMITS)
def test_a_row_does_not_depend_on_its_batch(form: Form, limits: dict):
    check_batch_independence(form, limits)


@FORMS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("limits", [None, *SOME_LIMITS])
def test_bad_rows_harm_nobody(form: Form, bad: float, limits: dict | None):
    check_bad_rows(form, bad, limits)


def test_the_pruning_bound_is_exact():
    """The token just inside GUMBEL_SPAN can win; so the bound may not be tightened."""
    assert GUMBEL_SPAN > 22.8739 + 2.8121  # the extremes of the noise
    assert GUMBEL_SPAN < 22.8739 + 2.8121 + 0.2


def test_equal_scores_go_to_the_lowest_id():
    vocab = 256
    logits = torch.full((1, vocab), -5.0)
    logits[0, [77, 78, 200]] = 3.0
    assert int(pruned.argmax_rows(logits)) == 77
    assert int(logits.argmax(-1)) == 77
    # At such a temperature the noise cannot be heard over the logits, and rounding makes ties.
    heat = torch.tensor([1e-30])
    key = make_key(1, torch.Generator().manual_seed(1))
    tokens = {int(f(logits, Draws(heat, key))) for f in (reference.draw, pruned.draw)}
    assert len(tokens) == 1
    assert tokens <= {77, 78, 200}


@pytest.mark.parametrize("vocab", [1, 7, 31, 32, 96, 128, 1000, 4096, 50_257])
def test_argmax_rows(vocab: int):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(6, vocab, generator=generator) * 3).round()
    assert torch.equal(pruned.argmax_rows(logits), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.4])
@pytest.mark.parametrize(
    "limits", [{}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.15}, {"top_k": 12, "top_p": 0.85}]
)
def test_marginals(temperature: float, limits: dict):
    """Over positions and over seeds, tokens follow the truncated softmax."""
    vocab, n = 48, 20_000
    generator = torch.Generator().manual_seed(9)
    row = torch.randn(vocab, generator=generator) * 2
    logits = row.expand(n, vocab).contiguous()
    half = n // 2
    key = NoiseKey(
        seed=torch.cat([torch.full((half,), 77), torch.arange(half)]),
        choice=torch.zeros(n, dtype=torch.int64),
        position=torch.cat([torch.arange(half), torch.full((half,), 5)]),
    )
    bounds = make_limits(n, vocab, **limits) if limits else None
    tokens = pruned.draw(logits, Draws(torch.full((n,), temperature), key, bounds))
    z = reference.scale(row[None], torch.tensor([temperature]))
    if limits:
        z = reference.truncate(z, make_limits(1, vocab, **limits))
    expected = n * z[0].double().softmax(-1)
    assert abs(chi_square(torch.bincount(tokens, minlength=vocab), expected)) < 4


def test_truncation_by_hand():
    z = torch.tensor([0.5, 0.2, 0.2, 0.06, 0.04]).log()[None]
    z = z - z.max()

    def kept(**limits: float) -> list[int]:
        return (
            reference.truncate(z, make_limits(1, 5, **limits))[0]
            .isfinite()
            .nonzero()[:, 0]
            .tolist()
        )

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=1) == [0]
    assert kept(top_k=2) == [0, 1, 2]  # ties with the second stay
    assert kept(top_p=0.5) == [0]
    assert kept(top_p=0.51) == [0, 1]  # the lower id first among equals
    assert kept(top_p=0.95) == [0, 1, 2, 3]
    assert kept(min_p=0.3) == [0, 1, 2]
    assert kept(min_p=1.0) == [0]
    assert kept(top_k=3, top_p=0.75) == [0, 1]  # of the mass of the three: 0.7 / 0.9
    assert kept(min_p=0.1, top_p=0.93) == [0, 1, 2]  # 0.06 / 0.5 stays, 0.04 / 0.5 goes: 0.9375


def test_no_limit_is_no_limit():
    """top_p = 1 keeps tokens whose mass vanishes in the sum."""
    z = torch.tensor([[0.0, -80.0, -90.0]])
    assert reference.truncate(z, make_limits(1, 3)).isfinite().all()
