"""Inputs of draws, and what every form of the draw has to satisfy."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from kernels.sampling import reference
from kernels.sampling.reference import NoiseKey, Truncation
from worker.sampler import Form

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
draws = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "n": st.integers(1, 5),
        "vocab": st.sampled_from(VOCABS),
        "kind": st.sampled_from(KINDS),
        "temperature": st.sampled_from([1e-39, 1e-6, 0.1, 0.7, 1.0, 1.7, 1e6]),
        "limits": st.none() | TRUNCATIONS,
    }
)


def check_reference(
    form: Form, seed: int, n: int, vocab: int, kind: str, temperature: float, limits: dict | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = make_logits(n, vocab, generator, kind)
    key = make_key(n, generator)
    heat = torch.full((n,), temperature)
    bounds = None if limits is None else make_limits(n, vocab, **limits)
    expected = reference.draw(logits, heat, key, bounds)
    assert torch.equal(form.draw(logits, heat, key, bounds), expected)
    assert torch.equal(form.argmax_rows(logits), reference.argmax_rows(logits))


def check_batch_independence(form: Form, limits: dict) -> None:
    """Bit for bit, with rows of other kinds and limits around a row, in any number and order."""
    generator = torch.Generator().manual_seed(3)
    n, vocab = 24, 4096
    logits = torch.cat([make_logits(6, vocab, generator, kind) for kind in KINDS])
    key, heat = make_key(n, generator), torch.rand(n, generator=generator) + 0.3
    bounds = make_limits(n, vocab, **limits) if limits else None
    if bounds is not None:
        bounds.top_k[::5] = 17
        bounds.top_p[::7] = 0.5
    together = form.draw(logits, heat, key, bounds)
    order = torch.randperm(n, generator=generator)
    for part in (order, order[:5], *(torch.tensor([i]) for i in range(n))):
        alone = form.draw(logits[part], heat[part], key.rows(part), bounds and bounds.rows(part))
        assert torch.equal(alone, together[part])


def check_bad_rows(form: Form, bad: float, limits: dict | None) -> None:
    """They get some token of the vocabulary, and the others what they would get without them."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 200, generator=generator)
    key, heat = make_key(4, generator), torch.ones(4)
    bounds = make_limits(4, 200, **limits) if limits else None
    clean = form.draw(logits, heat, key, bounds)
    logits[1, 50] = bad
    logits[2] = -math.inf
    assert form.usable(logits).tolist() == [True, False, False, True]
    tokens = form.draw(logits, heat, key, bounds)
    assert tokens[[0, 3]].tolist() == clean[[0, 3]].tolist()
    assert ((tokens >= 0) & (tokens < 200)).all()
    dead = torch.full((2, 64), math.nan)
    bounds = make_limits(2, 64, **limits) if limits else None
    tokens = form.draw(dead, torch.ones(2), make_key(2, generator), bounds)
    assert ((tokens >= 0) & (tokens < 64)).all()


SOME_LIMITS = [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}]


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
