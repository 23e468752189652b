"""The Triton choice against the specification: on a GPU, or under Triton's interpreter."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.sampling.cases import (
    KINDS,
    SOME_LIMITS,
    TRUNCATIONS,
    check_bad_rows,
    check_batch_independence,
    check_reference,
    draws,
    joined,
    make_key,
    make_logits,
)

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

from kernels.interpreter import interpreted, mend
from kernels.sampling import choose_triton, reference, truncate_triton
from kernels.sampling.philox import GUMBEL_SPAN
from kernels.sampling.reference import Draws, Truncation

if interpreted():
    mend()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(draw=draws)
def test_chooses_what_the_reference_chooses(draw: dict):
    check_reference(choose_triton, **draw)


def left_by(logits: torch.Tensor, heat: torch.Tensor, limits: Truncation) -> torch.Tensor:
    """[rows, vocab] bool, by the kernels."""
    vocab = logits.shape[1]
    size = choose_triton.block_size(vocab)
    maxima = torch.stack([block.amax(1) for block in logits.split(size, dim=1)], 1)
    last = truncate_triton.last_tokens(logits, maxima, heat, limits, size)
    depth = -reference.scale(logits, heat)
    edge = last.depth.view(torch.float32)[:, None]
    return (depth < edge) | ((depth == edge) & (torch.arange(vocab) <= last.token[:, None]))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.integers(4, 1500),
    kind=st.sampled_from(KINDS),
    heat=st.sampled_from([1e-39, 0.02, 0.3, 1.0, 1.7, 1e6]),
    limits=st.lists(TRUNCATIONS, min_size=1, max_size=3),
    block=st.sampled_from([256, 512]),
    capacity=st.sampled_from([8, 64, 8192]),
)
def test_what_is_left(
    seed: int, vocab: int, kind: str, heat: float, limits: list[dict], block: int, capacity: int
):
    """Of many blocks, with lists that overflow: exactly the reference's, but for tokens that cannot
    win."""
    generator = torch.Generator().manual_seed(seed)
    logits = make_logits(len(limits), vocab, generator, kind)
    heats, bounds = torch.full((len(limits),), heat), joined(limits, vocab)
    z = reference.scale(logits, heats)
    expected = reference.truncate(z, bounds).isfinite()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_triton, "BLOCK", block)
        patch.setattr(truncate_triton, "CAPACITY", capacity)
        left = left_by(logits, heats, bounds)
    decides = (z >= -GUMBEL_SPAN) | (bounds.top_p < 1.0)[:, None]
    assert torch.equal(left & decides, expected & decides)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(draw=draws)
def test_small_blocks_and_lists_choose_the_same(draw: dict):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_triton, "BLOCK", 256)
        patch.setattr(truncate_triton, "CAPACITY", 32)
        check_reference(choose_triton, **draw)


@pytest.mark.parametrize("limits", SOME_LIMITS)
def test_a_row_does_not_depend_on_its_batch(limits: dict):
    check_batch_independence(choose_triton, limits, alone=(0, 5, 14, 23))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("limits", [None, *SOME_LIMITS])
def test_bad_rows_harm_nobody(bad: float, limits: dict | None):
    check_bad_rows(choose_triton, bad, limits)


@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
def test_several_blocks(scale: float):
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(4, 3 * 4096 + 17, generator=generator) * scale
    logits[2] = (logits[2] * 2).round()
    by = Draws(torch.tensor([1.0, 0.5, 1.3, 0.0]), make_key(4, generator))
    assert torch.equal(choose_triton.choose(logits, by).tokens, reference.choose(logits, by).tokens)
