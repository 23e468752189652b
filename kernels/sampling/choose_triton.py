"""The choice of tokens as Triton kernels: `reference.choose` for a GPU.

`_scan` takes the maximum of each block of the logits, with its token. For greedy rows that is all;
`_draw` gives noise to the blocks that can still hold the winner and never reads the others again.
So the logits are read once, plus what little survives, and no [rows, vocab] array of noise or
scores is written. Rows of all kinds go the same way; which kind each is only the device looks at.
How far a truncated row reaches is found before (`truncate_triton.py`). `_conclude` makes one token
of the blocks' and counts the drafts that are confirmed.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv.triton_launch import Launch
from kernels.sampling.accept import Drafts
from kernels.sampling.penalize_triton import penalize as penalize
from kernels.sampling.philox import GUMBEL_SPAN, NOISE_VERSION
from kernels.sampling.reference import Chosen, Draws
from kernels.sampling.truncate_triton import depth_of, last_tokens, row_maximum, scaled

BLOCK = 4096  # tokens a program


def usable(logits: Tensor) -> Tensor:
    """As `reference.usable`."""
    return _scanned(logits.contiguous())[0].amax(1).isfinite()


def choose(
    logits: Tensor,
    draws: Draws | None = None,
    raw_usable: Tensor | None = None,
    drafts: Drafts | None = None,
) -> Chosen:
    """As `reference.choose`. Does not synchronise with the host."""
    logits = logits.contiguous()
    maxima, best = _scanned(logits)
    scores = maxima
    if draws is not None:
        scores, best = _drawn(logits, draws, maxima, best)
    rows, blocks, device = *maxima.shape, logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    usable = torch.empty(rows, dtype=torch.bool, device=device)
    sequences, first, last, judged, accepted = rows, None, None, None, None
    if drafts is not None:
        sequences, judged = len(drafts.first), drafts.tokens.contiguous()
        first, last = drafts.first.contiguous(), drafts.last.contiguous()
        accepted = torch.empty(sequences, dtype=torch.int64, device=device)
    launch = conclude_launch(blocks)
    _conclude[(sequences,)](
        maxima,
        scores,
        best,
        raw_usable,
        first,
        last,
        judged,
        tokens,
        usable,
        accepted,
        blocks,
        **launch.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return Chosen(tokens, usable, accepted)


def block_size(vocab: int) -> int:
    """Tokens a program looks at."""
    return min(BLOCK, triton.next_power_of_2(max(vocab, 4)))


def scan_launch(vocab: int) -> Launch:
    return Launch({"size": block_size(vocab)}, warps=4, stages=1)


def draw_launch(vocab: int) -> Launch:
    size = block_size(vocab)
    room = triton.next_power_of_2(triton.cdiv(vocab, size))
    constants = {"size": size, "room": room, "span": GUMBEL_SPAN, "version": NOISE_VERSION}
    return Launch(constants, warps=4, stages=1)


def conclude_launch(blocks: int) -> Launch:
    return Launch({"room": triton.next_power_of_2(blocks)}, warps=1, stages=1)


def _scanned(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each block's maximum, NaN where it holds any, [rows, blocks] float32; and the lowest id that
    has it, [rows, blocks] int32."""
    rows, vocab = logits.shape
    launch = scan_launch(vocab)
    blocks = triton.cdiv(vocab, block_size(vocab))
    maxima = torch.empty(rows, blocks, device=logits.device)
    best = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    _scan[(rows, blocks)](
        logits,
        maxima,
        best,
        vocab,
        blocks,
        **launch.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return maxima, best


def _drawn(logits: Tensor, draws: Draws, maxima: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Each block's best score and the lowest id that has it, as `_scanned`."""
    (rows, vocab), blocks = logits.shape, maxima.shape[1]
    temperature, limits, key = draws.temperature.contiguous(), draws.limits, draws.key
    depth = token = None
    if limits is not None:
        depth, token = last_tokens(logits, maxima, temperature, limits, block_size(vocab))
    scores, tokens = torch.empty_like(maxima), torch.empty_like(best)
    launch = draw_launch(vocab)
    _draw[(rows, blocks)](
        logits,
        maxima,
        best,
        temperature,
        key.seed.contiguous(),
        key.choice.contiguous(),
        key.position.contiguous(),
        depth,
        token,
        scores,
        tokens,
        vocab,
        blocks,
        **launch.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return scores, tokens


@triton.jit
def _scan(
    logits: tl.tensor,  # [rows, vocab] fp32
    maxima: tl.tensor,  # [rows, blocks] fp32, written
    best: tl.tensor,  # [rows, blocks] int32, written
    vocab: tl.tensor,
    blocks: tl.tensor,
    size: tl.constexpr,  # of a block, tokens
) -> None:
    row, block = tl.program_id(0), tl.program_id(1)
    at = block * size + tl.arange(0, size)
    x = tl.load(logits + row.to(tl.int64) * vocab + at, mask=at < vocab, other=-float("inf"))
    top = tl.max(x, 0)
    token = tl.min(tl.where(x == top, at, vocab - 1), 0)
    bad = tl.max((x != x).to(tl.int32), 0)
    tl.store(maxima + row * blocks + block, tl.where(bad != 0, float("nan"), top))
    tl.store(best + row * blocks + block, token)


@triton.jit
def _draw(
    logits: tl.tensor,  # [rows, vocab] fp32
    maxima: tl.tensor,  # [rows, blocks] fp32
    best: tl.tensor,  # [rows, blocks] int32, the token that has the block's maximum
    temperature: tl.tensor,  # [rows] fp32, 0: the score is the logit
    seed: tl.tensor,  # [rows] int64
    choice: tl.tensor,  # [rows] int64
    position: tl.tensor,  # [rows] int64
    last_depth: tl.tensor | None,  # [rows] int32, see `truncate_triton.Last`; None: all are left
    last_token: tl.tensor | None,  # [rows] int32
    scores: tl.tensor,  # [rows, blocks] fp32, written: the block's best z + g
    tokens: tl.tensor,  # [rows, blocks] int32, written: the token that has it
    vocab: tl.tensor,
    blocks: tl.tensor,
    size: tl.constexpr,
    room: tl.constexpr,  # a power of two, at least `blocks`
    span: tl.constexpr,
    version: tl.constexpr,
) -> None:
    row, block = tl.program_id(0), tl.program_id(1)
    heat = tl.load(temperature + row)
    highest = tl.load(maxima + row * blocks + block)
    score, token = highest, tl.load(best + row * blocks + block)
    if heat > 0:
        score, token = -float("inf"), vocab - 1
        top = row_maximum(maxima, row, blocks, room)
        nearest = scaled(highest, top, heat)
        reaches = nearest >= -span
        if last_depth is not None:
            reaches = reaches & (depth_of(nearest) <= tl.load(last_depth + row))
        if reaches:
            quads = block * (size // 4) + tl.arange(0, size // 4)
            zero = quads * 0
            words = tl.philox(
                tl.load(seed + row),
                quads,
                zero + tl.load(position + row).to(tl.int32),
                zero + tl.load(choice + row).to(tl.int32),
                zero + version,
            )
            most = tl.full((size // 4,), -float("inf"), tl.float32)
            of_most = quads * 4
            for w in tl.static_range(4):
                at = quads * 4 + w
                x = tl.load(
                    logits + row.to(tl.int64) * vocab + at, mask=at < vocab, other=-float("inf")
                )
                v = (words[w].to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * (2.0**-32)
                v = tl.minimum(v, 1.0 - 2.0**-24)
                # v is a multiple of 2^-33, so 1 - v is exact in fp64 and no log1p is needed.
                exponential = (-tl.log(1.0 - v.to(tl.float64))).to(tl.float32)
                g = (-tl.log(exponential.to(tl.float64))).to(tl.float32)
                z = scaled(x, top, heat)
                if last_depth is not None:
                    depth, last = depth_of(z), tl.load(last_depth + row)
                    left = (depth < last) | ((depth == last) & (at <= tl.load(last_token + row)))
                    z = tl.where(left, z, -float("inf"))
                better = z + g > most  # the lower id stays where they are equal
                most = tl.where(better, z + g, most)
                of_most = tl.where(better, at, of_most)
            score = tl.max(most, 0)
            token = tl.min(tl.where(most == score, of_most, vocab - 1), 0)
    tl.store(scores + row * blocks + block, score)
    tl.store(tokens + row * blocks + block, token)


# These two are parts of one upload, so where they begin depends on the step's size.
@triton.jit(do_not_specialize_on_alignment=["first", "last"])
def _conclude(
    maxima: tl.tensor,  # [rows, blocks] fp32
    scores: tl.tensor,  # [rows, blocks] fp32, of each block's best token
    best: tl.tensor,  # [rows, blocks] int32, that token
    raw_usable: tl.tensor | None,  # [rows] bool
    first: tl.tensor | None,  # [sequences] int64; None: a sequence is a row
    last: tl.tensor | None,  # [sequences] int64
    judged: tl.tensor | None,  # [rows] int32 or int64, drafts
    tokens: tl.tensor,  # [rows] int64, written
    usable: tl.tensor,  # [rows] bool, written
    accepted: tl.tensor | None,  # [sequences] int64, written
    blocks: tl.tensor,
    room: tl.constexpr,
) -> None:
    sequence = tl.program_id(0)
    begin, end = sequence, sequence
    if first is not None:
        begin = tl.load(first + sequence).to(tl.int32)
        end = tl.load(last + sequence).to(tl.int32)
    every = tl.arange(0, room)
    there = every < blocks
    matched, confirmed = tl.full((), 1, tl.int32), tl.full((), 0, tl.int64)
    for row in range(begin, end + 1):
        tops = tl.load(maxima + row * blocks + every, mask=there, other=-float("inf"))
        broken = (tops != tops) | (tops == float("inf"))
        good = (tl.max(broken.to(tl.int32), 0) == 0) & (tl.max(tops, 0) > -float("inf"))
        if raw_usable is not None:
            good = good & (tl.load(raw_usable + row) != 0)
        score = tl.load(scores + row * blocks + every, mask=there, other=-float("inf"))
        token = tl.load(best + row * blocks + every, mask=there, other=2**31 - 1)
        # Of equal scores the first block's, which has the lower ids.
        token = tl.min(tl.where(score == tl.max(score, 0), token, 2**31 - 1), 0)
        token = tl.where(good, token, 0)
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(usable + row, good)
        if judged is not None:
            matched = matched & ((token == tl.load(judged + row)) & (row < end)).to(tl.int32)
            confirmed += matched
    if accepted is not None:
        tl.store(accepted + sequence, confirmed)
