"""The specification of a choice: what every faster form must reproduce token for token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sampling.accept import Drafts, longest_matches
from kernels.sampling.philox import gumbel, noise_blocks
from kernels.sampling.processors import penalize as penalize


@dataclass(frozen=True, slots=True)
class NoiseKey:
    """What the noise of each row is a function of, besides the token."""

    seed: Tensor  # [n] int64, the 64 bits in two's complement
    choice: Tensor  # [n] int64
    position: Tensor  # [n] int64, the index the sampled token will occupy

    def rows(self, index: Tensor) -> NoiseKey:
        return NoiseKey(self.seed[index], self.choice[index], self.position[index])


@dataclass(frozen=True, slots=True)
class Truncation:
    """Which tokens of each row may be drawn."""

    log_min_p: Tensor  # [n] float32, log of min_p; -inf is off
    top_k: Tensor  # [n] int64; the vocabulary's size is off
    top_p: Tensor  # [n] float64; 1 is off

    def rows(self, index: Tensor) -> Truncation:
        return Truncation(self.log_min_p[index], self.top_k[index], self.top_p[index])


@dataclass(frozen=True, slots=True)
class Draws:
    """How each row is drawn."""

    temperature: Tensor  # [n] float32; 0: not at all, the largest logit is taken
    key: NoiseKey
    limits: Truncation | None = None  # None: off for every row

    def rows(self, index: Tensor) -> Draws:
        limits = None if self.limits is None else self.limits.rows(index)
        return Draws(self.temperature[index], self.key.rows(index), limits)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What came of `n` logits rows."""

    tokens: Tensor  # [n] int64, 0 where a row is not usable
    usable: Tensor  # [n] bool
    accepted: Tensor | None  # [sequences] int64, the drafts confirmed; None: none were to judge


def scale(logits: Tensor, temperature: Tensor) -> Tensor:
    """z = (logits - the row's maximum) / temperature; so z <= 0, and no temperature overflows.

    logits: [n, vocab] float32 (-inf is masked), temperature: [n] float32 > 0.
    """
    return (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]


def truncate(z: Tensor, limits: Truncation) -> Tensor:
    """Masks (-inf) what min-p, then top-k, then top-p remove; the most likely token always stays.

    - min-p keeps tokens at least `min_p` times as likely as the most likely one;
    - top-k keeps the k most likely of those, and all that tie with the k-th;
    - top-p keeps the shortest prefix of the rest, most likely first and the lower id first among
      equals, that holds at least `top_p` of the rest's probability (Holtzman et al. 2019).

    z: [n, vocab] float32 from `scale`. Returns a new tensor.
    """
    z = z.masked_fill(z < limits.log_min_p[:, None], -torch.inf)
    ordered, order = z.sort(dim=-1, descending=True, stable=True)
    kth = ordered.gather(-1, limits.top_k.clamp(max=z.shape[-1])[:, None] - 1)
    ordered = ordered.masked_fill(ordered < kth, -torch.inf)
    mass = ordered.double().exp_()
    running = mass.cumsum(-1)
    before = running - mass
    outside = before >= limits.top_p[:, None] * running[:, -1:]
    outside &= (limits.top_p < 1.0)[:, None]  # off is off, whatever rounding does to the sum
    return torch.empty_like(z).scatter_(-1, order, ordered.masked_fill_(outside, -torch.inf))


def noise(key: NoiseKey, vocab: int) -> Tensor:
    """g for every token of every row: [n, vocab] float32."""
    blocks = torch.arange((vocab + 3) // 4, device=key.seed.device)
    v = noise_blocks(blocks, key.seed[:, None], key.choice[:, None], key.position[:, None])
    return gumbel(v[:, :vocab])


def usable(logits: Tensor) -> Tensor:
    """Rows whose maximum is finite and that hold no NaN: [n, vocab] -> [n] bool."""
    return logits.amax(-1).isfinite()


def argmax_rows(logits: Tensor) -> Tensor:
    """argmax over the last dimension, ties to the lowest id: [n, vocab] -> [n] int64."""
    return logits.argmax(-1)  # torch promises the first of equal maxima


def draw(logits: Tensor, by: Draws) -> Tensor:
    """argmax of z + g, ties to the lowest id: [n] int64; rows of temperature 0: of the logits.

    A row without a finite maximum gives token 0.
    """
    greedy = by.temperature == 0
    # The most likely token survives every truncation and scales to 0, the others to less: so a
    # greedy row may go the same way, if no noise is added.
    z = scale(logits, by.temperature.masked_fill(greedy, 1.0))
    if by.limits is not None:
        z = truncate(z, by.limits)
    score = z + noise(by.key, z.shape[-1]).masked_fill_(greedy[:, None], 0.0)
    return score.nan_to_num_(nan=-torch.inf).argmax(-1)


def choose(
    logits: Tensor,
    draws: Draws | None = None,
    raw_usable: Tensor | None = None,
    drafts: Drafts | None = None,
) -> Chosen:
    """A token for each row, and how many drafts these confirm.

    logits: [n, vocab] float32. draws: None if every row is greedy. raw_usable: [n] bool, of the
    logits as the model gave them, where these are processed ones: rows have to be usable before
    and after.
    """
    tokens = argmax_rows(logits) if draws is None else draw(logits, draws)
    return conclude(tokens, usable(logits), raw_usable, drafts)


def conclude(
    tokens: Tensor, usable: Tensor, raw_usable: Tensor | None, drafts: Drafts | None
) -> Chosen:
    """The end of `choose`. tokens: [n] int64, written; usable: [n] bool."""
    if raw_usable is not None:
        usable = usable & raw_usable
    tokens.masked_fill_(~usable, 0)
    accepted = None if drafts is None else longest_matches(tokens, drafts)
    return Chosen(tokens, usable, accepted)
