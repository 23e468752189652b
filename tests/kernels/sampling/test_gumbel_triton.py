"""The Triton draw against the specification: on a GPU, or under Triton's interpreter."""

import os

import pytest
import torch
from hypothesis import given, settings

from tests.kernels.sampling.cases import (
    SOME_LIMITS,
    check_batch_independence,
    check_reference,
    draws,
    make_key,
)

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

from kernels.sampling import gumbel_triton, reference


@settings(max_examples=60, deadline=None, derandomize=True)
@given(draw=draws)
def test_draws_what_the_reference_draws(draw: dict):
    check_reference(gumbel_triton, **draw)


@pytest.mark.parametrize("limits", SOME_LIMITS)
def test_a_row_does_not_depend_on_its_batch(limits: dict):
    check_batch_independence(gumbel_triton, limits)


@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
def test_several_blocks(scale: float):
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(3, 3 * 4096 + 17, generator=generator) * scale
    logits[2] = (logits[2] * 2).round()
    key, heat = make_key(3, generator), torch.tensor([1.0, 0.5, 1.3])
    assert torch.equal(gumbel_triton.draw(logits, heat, key), reference.draw(logits, heat, key))
