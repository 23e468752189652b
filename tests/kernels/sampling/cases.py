"""Inputs of choices, and what every form of the choice has to satisfy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from kernels.sampling import reference
from kernels.sampling.accept import Drafts, longest_matches
from kernels.sampling.reference import Draws, NoiseKey, Truncation
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


def joined(limits: Sequence[dict], vocab: int) -> Truncation:
    """A row of each, as `make_limits` takes them."""
    rows = [make_limits(1, vocab, **limit) for limit in limits]
    return Truncation(
        torch.cat([row.log_min_p for row in rows]),
        torch.cat([row.top_k for row in rows]),
        torch.cat([row.top_p for row in rows]),
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


def make_drafts(tokens: torch.Tensor, generator: torch.Generator) -> Drafts:
    """Of sequences of random lengths; some are what was sampled, others one off."""
    n = len(tokens)
    cuts = torch.rand(n, generator=generator) < 0.4
    cuts[0] = True
    first = cuts.nonzero()[:, 0]
    last = torch.cat([first[1:], torch.tensor([n])]) - 1
    wrong = torch.rand(n, generator=generator) < 0.3
    return Drafts((tokens + wrong).int(), cuts.cumsum(0) - 1, first, last)


KINDS = ("flat", "peaked", "ties", "masked")
TEMPERATURES = (0.0, 1e-39, 1e-6, 0.1, 0.7, 1.0, 1.7, 1e6)
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
        "vocab": st.sampled_from(VOCABS),
        "rows": st.lists(
            st.tuples(
                st.sampled_from(KINDS), st.sampled_from(TEMPERATURES), st.just({}) | TRUNCATIONS
            ),
            min_size=1,
            max_size=5,
        ),
    }
)


def check_reference(form: Form, seed: int, vocab: int, rows: list[tuple[str, float, dict]]) -> None:
    """Rows of all kinds side by side, and what they confirm."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.cat([make_logits(1, vocab, generator, kind) for kind, _, _ in rows])
    each = [limit for _, _, limit in rows]
    limits = joined(each, vocab) if any(each) else None
    heat = torch.tensor([heat for _, heat, _ in rows])
    by = Draws(heat, make_key(len(rows), generator), limits)
    for draws in (by, None):
        expected = reference.choose(logits, draws)
        assert torch.equal(form.choose(logits, draws).tokens, expected.tokens)
        drafts = make_drafts(expected.tokens, generator)
        chosen = form.choose(logits, draws, None, drafts)
        assert torch.equal(chosen.tokens, expected.tokens)
        assert chosen.usable.all()
        assert chosen.accepted is not None
        assert torch.equal(chosen.accepted, longest_matches(expected.tokens, drafts))


def check_batch_independence(form: Form, limits: dict, alone: Sequence[int] = range(24)) -> None:
    """Bit for bit, with rows of other kinds and limits around a row, in any number and order; these
    of the 24 also by themselves."""
    generator = torch.Generator().manual_seed(3)
    n, vocab = 24, 4096
    logits = torch.cat([make_logits(6, vocab, generator, kind) for kind in KINDS])
    key, heat = make_key(n, generator), torch.rand(n, generator=generator) + 0.3
    heat[::4] = 0.0
    bounds = make_limits(n, vocab, **limits) if limits else None
    if bounds is not None:
        bounds.top_k[::5] = 17
        bounds.top_p[::7] = 0.5
    by = Draws(heat, key, bounds)
    together = form.choose(logits, by).tokens
    order = torch.randperm(n, generator=generator)
    for part in (order, order[:5], *(torch.tensor([i]) for i in alone)):
        assert torch.equal(form.choose(logits[part], by.rows(part)).tokens, together[part])


def check_bad_rows(form: Form, bad: float, limits: dict | None) -> None:
    """They are told and get token 0, and the others what they would get without them."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5, 200, generator=generator)
    heat = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    bounds = make_limits(5, 200, **limits) if limits else None
    draws = Draws(heat, make_key(5, generator), bounds)
    for by in (draws, None):
        clean = form.choose(logits, by).tokens
        drafts = Drafts(clean, torch.zeros(5, dtype=torch.int64), *torch.tensor([[0], [4]]))
        broken = logits.clone()
        broken[1, 50] = bad
        broken[2] = -math.inf
        good = [True, False, False, True, True]
        assert form.usable(broken).tolist() == good
        chosen = form.choose(broken, by, None, drafts)
        assert chosen.usable.tolist() == good
        assert torch.equal(chosen.tokens, clean.masked_fill(~torch.tensor(good), 0))
        assert chosen.accepted is not None
        assert chosen.accepted.tolist() == [1]
        # What was not usable before it was processed is not afterwards.
        before = torch.tensor([True, True, True, False, True])
        chosen = form.choose(broken, by, before)
        assert chosen.usable.tolist() == [True, False, False, False, True]
        assert chosen.tokens[1:4].tolist() == [0, 0, 0]
        dead = torch.full((5, 64), math.nan)
        narrow = make_limits(5, 64, **limits) if limits else None
        chosen = form.choose(dead, by and Draws(heat, by.key, narrow))
        assert chosen.tokens.tolist() == [0] * 5
        assert not chosen.usable.any()


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
