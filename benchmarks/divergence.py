"""Where two texts of one request part, and how close the choice was there.

Batches of other shapes round differently in bfloat16, so a draft may tip a choice that was all but
even. A text that parts where one score was well ahead of the other would be a fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.llm import LLM
from kernels.sampling.reference import NoiseKey, noise
from scheduler.request import SamplingParams, Speculation

MOST_CHOICES = 20  # tokens whose log-probabilities can be asked for at once


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first position at which two texts differ."""

    at: int  # tokens that they have in common
    tokens: tuple[int, int]  # what either has there
    margin: float  # of the first one's score over the second's, noise included, in nats


def first_divergence(
    llm: LLM,
    prompt: Sequence[int],
    params: SamplingParams,
    one: Sequence[int],
    other: Sequence[int],
) -> Divergence | None:
    """None: one of the texts is the beginning of the other.

    The prefix they share is read again, without drafts. `params` may hold a temperature and a seed;
    of what else changes scores nothing is known here. A token that is none of the `MOST_CHOICES`
    likeliest is taken to be as likely as the last of them.
    """
    pairs = zip(one, other, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return None
    tokens = one[at], other[at]
    shared = (*prompt, *one[:at])
    asked = replace(params, max_tokens=1, temperature=0.0, logprobs=MOST_CHOICES)
    done = llm.generate([shared], asked, ignore_eos=True, speculation=Speculation(enabled=False))
    top = dict(done[0].choices[0].logprobs[0].top)
    least = min(top.values())
    scores = [top.get(token, least) for token in tokens]
    if params.temperature > 0:
        g = noise_at(params.seed, len(shared), llm.facts.vocab_size)
        scores = [
            score / params.temperature + float(g[token])
            for score, token in zip(scores, tokens, strict=True)
        ]
    return Divergence(at, tokens, scores[0] - scores[1])


def noise_at(seed: int, position: int, vocab: int) -> torch.Tensor:
    """[vocab] fp32: what is added to the scores of a first choice's token at a position."""
    signed = seed - 2**64 if seed >= 2**63 else seed
    key = NoiseKey(torch.tensor([signed]), torch.tensor([0]), torch.tensor([position]))
    return noise(key, vocab)[0]
