"""The draw as two Triton kernels: `reference.draw` for a GPU.

The first takes the maximum of each block of the logits; the second gives noise to the blocks that
can still hold the winner and never reads the others again. So the logits are read once, plus what
little survives, and no [rows, vocab] array of noise or scores is written. Truncated rows are
masked by the reference first, which sorts.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling import reference
from kernels.sampling.philox import GUMBEL_SPAN, NOISE_VERSION
from kernels.sampling.reference import NoiseKey, Truncation

_BLOCK = 4096  # tokens a program


def usable(logits: Tensor) -> Tensor:
    """As `reference.usable`."""
    return reference.usable(logits)


def argmax_rows(logits: Tensor) -> Tensor:
    """As `reference.argmax_rows`."""
    return reference.argmax_rows(logits)


def draw(
    logits: Tensor, temperature: Tensor, key: NoiseKey, limits: Truncation | None = None
) -> Tensor:
    """As `reference.draw`. Does not synchronise with the host."""
    if limits is not None:
        logits = reference.truncate(reference.scale(logits, temperature), limits)
        temperature = torch.ones_like(temperature)
    rows, vocab = logits.shape
    logits = logits.contiguous()
    block = min(_BLOCK, triton.next_power_of_2(max(vocab, 4)))
    blocks = triton.cdiv(vocab, block)
    maxima = torch.empty(rows, blocks, device=logits.device)
    scores = torch.empty_like(maxima)
    tokens = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    _block_maxima[(rows, blocks)](logits, maxima, vocab, blocks, block)
    _draw_block[(rows, blocks)](
        logits,
        maxima,
        temperature.contiguous(),
        key.seed.contiguous(),
        key.choice.contiguous(),
        key.position.contiguous(),
        scores,
        tokens,
        vocab,
        blocks,
        block,
        triton.next_power_of_2(blocks),
        GUMBEL_SPAN,
        NOISE_VERSION,
    )
    # Of equal scores the first block's, which has the lower ids.
    return tokens.gather(1, scores.argmax(1, keepdim=True)).squeeze(1).long()


@triton.jit
def _block_maxima(
    logits: tl.tensor, maxima: tl.tensor, vocab: tl.tensor, blocks: tl.tensor, size: tl.constexpr
) -> None:
    row, block = tl.program_id(0), tl.program_id(1)
    at = block * size + tl.arange(0, size)
    x = tl.load(logits + row.to(tl.int64) * vocab + at, mask=at < vocab, other=-float("inf"))
    tl.store(maxima + row * blocks + block, tl.max(x, 0))


@triton.jit
def _draw_block(
    logits: tl.tensor,  # [rows, vocab] fp32
    maxima: tl.tensor,  # [rows, blocks] fp32
    temperature: tl.tensor,  # [rows] fp32
    seed: tl.tensor,  # [rows] int64
    choice: tl.tensor,  # [rows] int64
    position: tl.tensor,  # [rows] int64
    scores: tl.tensor,  # [rows, blocks] fp32, written: the block's best z + g
    tokens: tl.tensor,  # [rows, blocks] int32, written: the token that has it
    vocab: tl.tensor,
    blocks: tl.tensor,
    size: tl.constexpr,  # of a block, tokens
    room: tl.constexpr,  # a power of two, at least `blocks`
    span: tl.constexpr,
    version: tl.constexpr,
) -> None:
    row, block = tl.program_id(0), tl.program_id(1)
    lowest = -float("inf")
    every = tl.arange(0, room)
    tops = tl.load(maxima + row * blocks + every, mask=every < blocks, other=lowest)
    top = tl.max(tops, 0)
    own = tl.load(maxima + row * blocks + block)
    heat = tl.load(temperature + row)
    best_score, best_token = lowest, 0
    if (own - top) / heat >= -span:
        quads = block * (size // 4) + tl.arange(0, size // 4)
        zero = quads * 0
        words = tl.philox(
            tl.load(seed + row),
            quads,
            zero + tl.load(position + row).to(tl.int32),
            zero + tl.load(choice + row).to(tl.int32),
            zero + version,
        )
        best = tl.full((size // 4,), lowest, tl.float32)
        token = quads * 4
        for w in tl.static_range(4):
            at = quads * 4 + w
            x = tl.load(logits + row.to(tl.int64) * vocab + at, mask=at < vocab, other=lowest)
            v = (words[w].to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * (2.0**-32)
            v = tl.minimum(v, 1.0 - 2.0**-24)
            # v is a multiple of 2^-33, so 1 - v is exact in fp64 and no log1p is needed.
            exponential = (-tl.log(1.0 - v.to(tl.float64))).to(tl.float32)
            g = (-tl.log(exponential.to(tl.float64))).to(tl.float32)
            score = tl.div_rn(x - top, heat + tl.zeros_like(x)) + g
            better = score > best  # the lower id stays where they are equal
            best = tl.where(better, score, best)
            token = tl.where(better, at, token)
        best_score = tl.max(best, 0)
        best_token = tl.min(tl.where(best == best_score, token, vocab), 0)
    tl.store(scores + row * blocks + block, best_score)
    tl.store(tokens + row * blocks + block, tl.minimum(best_token, vocab - 1))
