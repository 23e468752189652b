"""The penalties' Triton kernels against torch: on a GPU, or under Triton's interpreter."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

from kernels.interpreter import interpreted, mend
from kernels.sampling import penalize_triton, processors
from kernels.sampling.processors import History, Penalties

if interpreted():
    mend()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 5),
    vocab=st.sampled_from([4, 30, 1000]),
    width=st.sampled_from([1, 20, 300, 5000]),
    every=st.booleans(),
)
def test_bit_for_bit(seed: int, n: int, vocab: int, width: int, every: bool):
    """Tokens that occur often, across programs and within one, in prompts, outputs and both."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator)

    def some(*values: float) -> torch.Tensor:
        return torch.tensor(values)[draw(0, len(values), m)]

    rows = None if every else torch.randperm(n, generator=generator)[: max(n // 2, 1)]
    m = n if rows is None else len(rows)
    z = torch.randn(n, vocab, generator=generator) * 3
    z[:, ::3] = -torch.inf
    history = History(
        draw(0, vocab, 7, width).int(),
        draw(0, 7, m),
        draw(1, width + 1, m),
        draw(1, width + 1, m),
    )
    by = Penalties(some(1.0, 1.3, 0.7), some(0.0, 0.31, -0.4), some(0.0, 0.73, -1.5))
    expected = z.clone()
    processors.penalize(expected, rows, history, by)
    penalize_triton.penalize(z, rows, history, by)
    assert torch.equal(z, expected)
