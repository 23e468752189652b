"""Drawing a token: the fast forms against the specification, the specification against softmax."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sampling import pruned, reference
from kernels.sampling.philox import GUMBEL_SPAN
from kernels.sampling.reference import NoiseKey, Truncation

VOCABS = (4, 5, 32, 37, 100, 1000, 4096)


def make_key(n: int, generator: torch.Generator) -> NoiseKey:
    return NoiseKey(
        seed=torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator),
        choice=torch.randint(0, 4, (n,), generator=generator),
        position=torch.randint(1, 9000, (n,), generator=generator),
    )


def make_limits(
    n: int, vocab: int, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> Truncation:
    return Truncation(
        log_min_p=torch.full((n,), math.log(min_p) if min_p else -math.inf),
        top_k=torch.full((n,), top_k or vocab),
        top_p=torch.full((n,), top_p, dtype=torch.float64),
    )


def make_logits(n: int, vocab: int, generator: torch.Generator, kind: str) -> torch.Tensor:
    logits = torch.randn(n, vocab, generator=generator)
    if kind == "flat":
        return logits
    if kind == "peaked":
        return logits * 12
    if kind == "ties":  # few distinct values, as bf16 logits have
        return (logits * 2).round()
    if kind == "masked":
        masked = logits.masked_fill(torch.rand(n, vocab, generator=generator) < 0.7, -math.inf)
        masked[:, vocab // 2] = 1.0
        return masked
    raise ValueError(kind)


KINDS = ("flat", "peaked", "ties", "masked")
TRUNCATIONS = st.fixed_dictionaries(
    {},
    optional={
        "min_p": st.sampled_from([1e-8, 0.01, 0.2, 1.0]),
        "top_k": st.sampled_from([1, 2, 7, 40, 500]),
        "top_p": st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1 - 1e-7]),
    },
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 5),
    vocab=st.sampled_from(VOCABS),
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([1e-6, 0.1, 0.7, 1.0, 1.7, 1e6]),
    limits=st.none() | TRUNCATIONS,
)
def test_pruned_draws_what_the_reference_draws(seed, n, vocab, kind, temperature, limits):
    generator = torch.Generator().manual_seed(seed)
    logits = make_logits(n, vocab, generator, kind)
    key = make_key(n, generator)
    heat = torch.full((n,), temperature)
    bounds = None if limits is None else make_limits(n, vocab, **limits)
    expected = reference.draw(logits, heat, key, bounds)
    assert torch.equal(pruned.draw(logits, heat, key, bounds), expected)


@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_a_row_does_not_depend_on_its_batch(limits: dict):
    """Bit for bit, with rows of other kinds and limits around it, in any number and order."""
    generator = torch.Generator().manual_seed(3)
    n, vocab = 24, 4096
    logits = torch.cat([make_logits(6, vocab, generator, kind) for kind in KINDS])
    key, heat = make_key(n, generator), torch.rand(n, generator=generator) + 0.3
    bounds = make_limits(n, vocab, **limits) if limits else None
    if bounds is not None:
        bounds.top_k[::5] = 17
        bounds.top_p[::7] = 0.5
    together = pruned.draw(logits, heat, key, bounds)
    order = torch.randperm(n, generator=generator)
    for part in (order, order[:5], *(torch.tensor([i]) for i in range(n))):
        alone = pruned.draw(logits[part], heat[part], key.rows(part), bounds and bounds.rows(part))
        assert torch.equal(alone, together[part])


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
    tokens = {int(f(logits, heat, key)) for f in (reference.draw, pruned.draw)}
    assert len(tokens) == 1
    assert tokens <= {77, 78, 200}


@pytest.mark.parametrize("vocab", [1, 7, 31, 32, 96, 128, 1000, 4096, 50_257])
def test_argmax_rows(vocab: int):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(6, vocab, generator=generator) * 3).round()
    assert torch.equal(pruned.argmax_rows(logits), logits.argmax(-1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("limits", [None, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_bad_rows_harm_nobody(bad: float, limits: dict | None):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 200, generator=generator)
    key, heat = make_key(4, generator), torch.ones(4)
    bounds = make_limits(4, 200, **limits) if limits else None
    clean = pruned.draw(logits, heat, key, bounds)
    logits[1, 50] = bad
    logits[2] = -math.inf
    for draw in (pruned.draw, reference.draw):
        tokens = draw(logits, heat, key, bounds)
        assert tokens[[0, 3]].tolist() == clean[[0, 3]].tolist()
        assert ((tokens >= 0) & (tokens < 200)).all()
    dead = torch.full((2, 64), math.nan)
    key = make_key(2, generator)
    dead_bounds = make_limits(2, 64, **limits) if limits else None
    assert pruned.draw(dead, torch.ones(2), key, dead_bounds).tolist() == [0, 0]


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Standardised: about N(0, 1) for the right distribution. Cells are merged below 5 expected."""
    large = expected >= 5
    counts = torch.cat([counts[large], counts[~large].sum()[None]]).double()
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    cells = expected > 0
    assert not counts[~cells].any()  # nothing outside the support
    statistic = float(((counts - expected)[cells] ** 2 / expected[cells]).sum())
    freedom = int(cells.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom) if freedom else 0.0


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
    tokens = pruned.draw(logits, torch.full((n,), temperature), key, bounds)
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
