"""A second opinion: the sampler as a person would compute it by hand, one token at a time.

Shares nothing with kernels/sampling/ but the text of the definition. Plain Python numbers; numpy
scalars only where the definition asks for float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from scheduler.request import SamplingParams

f32 = np.float32


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 on Python integers, round by round as in the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (right >> 32) ^ c[1] ^ k[0],
            right & 0xFFFFFFFF,
            (left >> 32) ^ c[3] ^ k[1],
            left & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def gumbel_of_word(word: int) -> np.float32:
    v = min((f32(word) + f32(0.5)) * f32(2.0**-32), f32(1 - 2.0**-24))
    exponential = f32(-math.log1p(-float(v)))
    return f32(-math.log(float(exponential)))


def gumbel(seed: int, choice: int, position: int, token: int) -> np.float32:
    words = philox((token // 4, position, choice, 1), (seed & 0xFFFFFFFF, seed >> 32))
    return gumbel_of_word(words[token % 4])


def process(
    logits: Sequence[float], params: SamplingParams, history: Sequence[int], prompt_len: int
) -> list[np.float32]:
    """Everything before temperature."""
    z = [f32(x) for x in logits]
    output = list(history[prompt_len:])
    for token in set(history):
        by = f32(params.repetition_penalty)
        if params.repetition_penalty != 1:
            z[token] = z[token] / by if z[token] > 0 else z[token] * by
    for token in set(output):
        z[token] = z[token] - f32(params.frequency_penalty) * f32(output.count(token))
        z[token] = z[token] - f32(params.presence_penalty)
    for token, bias in params.logit_bias:
        z[token] = z[token] + f32(bias)
    if params.allowed_token_ids is not None:
        for token in range(len(z)):
            if token not in params.allowed_token_ids:
                z[token] = f32(-math.inf)
    for word in params.bad_words:
        prefix = list(word[:-1])
        if not prefix or list(history[-len(prefix) :]) == prefix:
            z[word[-1]] = f32(-math.inf)
    if len(output) < params.min_tokens:
        for token in params.stop_token_ids:
            z[token] = f32(-math.inf)
    return z


def survivors(z: Sequence[np.float32], params: SamplingParams) -> dict[int, np.float32]:
    """Tokens min-p, top-k and top-p leave, with their scaled logits. Needs temperature > 0."""
    top = max(z)
    scaled = [(x - top) / f32(params.temperature) for x in z]
    left = {t: x for t, x in enumerate(scaled) if x > -math.inf}
    if params.min_p > 0:
        left = {t: x for t, x in left.items() if x >= f32(math.log(params.min_p))}
    if 0 < params.top_k < len(left):
        kth = sorted(left.values(), reverse=True)[params.top_k - 1]
        left = {t: x for t, x in left.items() if x >= kth}
    if params.top_p < 1:
        total = math.fsum(math.exp(x) for x in left.values())
        kept, mass = {}, 0.0
        for token in sorted(left, key=lambda t: (-left[t], t)):
            if mass >= params.top_p * total:
                break
            kept[token] = left[token]
            mass += math.exp(left[token])
        left = kept
    return left


def sample(
    logits: Sequence[float],
    params: SamplingParams,
    choice: int,
    history: Sequence[int],
    prompt_len: int,
) -> int | None:
    """The token, or None where nothing can be chosen."""
    if any(math.isnan(x) or x == math.inf for x in logits):
        return None
    z = process(logits, params, history, prompt_len)
    if max(z) == -math.inf:
        return None
    if params.temperature == 0:
        return max(range(len(z)), key=lambda t: (z[t], -t))
    left = survivors(z, params)
    score = {t: x + gumbel(params.seed, choice, len(history), t) for t, x in left.items()}
    return max(score, key=lambda t: (score[t], -t))
