"""The native sampler against the specification."""

import math

import pytest
import torch
from hypothesis import given, settings

from kernels.cpu.ops import NativeOps
from kernels.sampling import pruned
from kernels.sampling.reference import Draws
from tests.kernels.sampling.cases import (
    SOME_LIMITS,
    check_bad_rows,
    check_batch_independence,
    check_reference,
    draws,
    make_key,
    make_limits,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(draw=draws)
def test_draws_what_the_reference_draws(native: NativeOps, draw: dict):
    check_reference(native.sampling(), **draw)


@pytest.mark.parametrize("limits", SOME_LIMITS)
def test_a_row_does_not_depend_on_its_batch(native: NativeOps, limits: dict):
    check_batch_independence(native.sampling(), limits)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("limits", [None, *SOME_LIMITS])
def test_bad_rows_harm_nobody(native: NativeOps, bad: float, limits: dict | None):
    check_bad_rows(native.sampling(), bad, limits)


@pytest.mark.parametrize("limits", [None, {"top_k": 40, "top_p": 0.9}, {"top_p": 0.99}])
def test_a_real_vocabulary(native: NativeOps, limits: dict | None):
    """Against the other CPU form, which the reference covers at small sizes."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 151_937, generator=generator) * 3
    logits[1] *= 3
    logits[2] = logits[2].bfloat16().float()  # ties
    bounds = make_limits(3, 151_937, **limits) if limits else None
    by = Draws(torch.tensor([1.0, 0.6, 1.2]), make_key(3, generator), bounds)
    expected = pruned.choose(logits, by).tokens
    assert torch.equal(native.sampling().choose(logits, by).tokens, expected)


def test_threads_change_nothing(native: NativeOps, threads: None):
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(37, 4096, generator=generator) * 3
    by = Draws(torch.ones(37), make_key(37, generator))
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(native.sampling().choose(logits, by).tokens)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_threads_change_nothing_about_what_is_looked_at(native: NativeOps, threads: None):
    logits = torch.randn(9, 1 << 17, generator=torch.Generator().manual_seed(7))
    logits[4, 77] = math.nan
    logits[7] = -math.inf
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        usable = native.sampling().usable(logits)
        assert torch.equal(usable, pruned.usable(logits))
        chosen = native.sampling().choose(logits)
        assert torch.equal(chosen.usable, usable)
        assert torch.equal(chosen.tokens[usable], logits.argmax(-1)[usable])


def test_refuses_other_layouts(native: NativeOps):
    form, key = native.sampling(), make_key(2, torch.Generator())
    logits = torch.zeros(2, 64)
    for wrong in (logits.double(), logits.T.contiguous().T, logits[0]):
        with pytest.raises(ValueError, match="logits"):
            form.choose(wrong)
    with pytest.raises(ValueError, match="float32"):
        form.choose(logits, Draws(torch.ones(2, dtype=torch.float64), key))
    with pytest.raises(ValueError, match="a row"):
        form.choose(logits, Draws(torch.ones(3), key))
