"""What min-p, top-k and top-p leave of a row, without sorting it: `reference.truncate` on a GPU.

What is left is a prefix of the row, the largest z first and the lower id among equals. So it is
told by its last token: that token's depth, and the id up to which tokens of this very depth are
left. The depth of a token is |z| as an integer; as z <= 0, it ascends as z descends.

1. `_measure` counts and weighs, block by block of the row, what is no deeper than sixteen depths.
2. `_collect` moves what is no deeper than the first of them that is certainly enough to a list.
3. `_find` looks for the last token in the list, one program a row. Sixteen bounds are tried at
   once, so eight readings of the list tell one depth of 31 bits. A row with more candidates than a
   list takes is read itself: slower, and the same.

z, min-p and top-k are exact. The masses of top-p are float64 as in the reference, but not added in
its order, nor is there one: torch adds in another on a CPU than on a GPU. Where a nucleus ends
within that rounding, about 1e-13 of the mass, it may have a token more or less.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv.triton_launch import Launch
from kernels.sampling.reference import Truncation

CAPACITY = 8192  # candidates a list takes
WAYS = 16  # depths that are tried at once
# The depths of `_measure`: 0.5, 0.75, 1, 1.5, … 96. What is deeper than the last cannot win without
# top-p, whatever the noise; and its mass is lost in the rounding of a sum of at least 1.
_FIRST, _STEP = tl.constexpr(0x3F000000), tl.constexpr(0x00400000)
_DEEPEST = tl.constexpr(0x42C00000)
_NEVER = tl.constexpr(0x7F800000)  # the depth of what is masked
# Masses are measured in float32: this much more is certainly enough.
_CERTAIN = tl.constexpr(1.0001)


class Last(NamedTuple):
    """The last token that is left of each row."""

    depth: Tensor  # [rows] int32
    token: Tensor  # [rows] int32; the vocabulary's size: all of that depth are left


def last_tokens(
    logits: Tensor, maxima: Tensor, temperature: Tensor, limits: Truncation, size: int
) -> Last:
    """logits: [rows, vocab] float32, contiguous; maxima: [rows, blocks] float32, of every `size`
    tokens; temperature: [rows] float32, 0 where nothing is drawn: such rows are left whole.

    Does not synchronise with the host.
    """
    (rows, vocab), blocks, device = logits.shape, maxima.shape[1], logits.device
    counts = torch.empty(rows, blocks, WAYS, dtype=torch.int32, device=device)
    masses = torch.empty(rows, blocks, WAYS, device=device)
    totals = torch.empty(rows, blocks, dtype=torch.float64, device=device)
    values = torch.empty(rows, CAPACITY, device=device)
    ids = torch.empty(rows, CAPACITY, dtype=torch.int32, device=device)
    found, floor, depth, token = (
        torch.empty(rows, dtype=torch.int32, device=device) for _ in range(4)
    )
    log_min_p, top_k, top_p = (
        column.contiguous() for column in (limits.log_min_p, limits.top_k, limits.top_p)
    )

    def run(kernel: Any, grid: tuple[int, ...], launch: Launch, *arrays: Tensor) -> None:
        kernel[grid](
            logits,
            maxima,
            temperature,
            log_min_p,
            top_k,
            top_p,
            *arrays,
            vocab,
            blocks,
            **launch.constants,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )

    every = (rows, blocks)
    run(_measure, every, measure_launch(size, blocks), counts, masses, totals)
    run(_collect, every, collect_launch(size, blocks), counts, masses, values, ids, found, floor)
    run(_find, (rows,), find_launch(blocks), totals, values, ids, found, floor, depth, token)
    return Last(depth, token)


def measure_launch(size: int, blocks: int) -> Launch:
    room = triton.next_power_of_2(blocks)
    return Launch({"size": size, "room": room, "ways": WAYS, "tile": 256}, warps=4, stages=3)


def collect_launch(size: int, blocks: int) -> Launch:
    room = triton.next_power_of_2(blocks)
    constants = {"size": size, "room": room, "ways": WAYS, "capacity": CAPACITY}
    return Launch(constants, warps=4, stages=1)


def find_launch(blocks: int) -> Launch:
    room = triton.next_power_of_2(blocks)
    constants = {"room": room, "ways": WAYS, "tile": 1024, "capacity": CAPACITY}
    return Launch(constants, warps=16, stages=3)


@triton.jit
def row_maximum(
    maxima: tl.tensor, row: tl.tensor, blocks: tl.tensor, room: tl.constexpr
) -> tl.tensor:
    """The largest logit of a row. room: a power of two, at least `blocks`."""
    every = tl.arange(0, room)
    tops = tl.load(maxima + row * blocks + every, mask=every < blocks, other=-float("inf"))
    return tl.max(tops, 0)


@triton.jit
def scaled(x: tl.tensor, top: tl.tensor, heat: tl.tensor) -> tl.tensor:
    """z, as `reference.scale` rounds it."""
    return tl.div_rn(x - top, heat + tl.zeros_like(x))


@triton.jit
def depth_of(z: tl.tensor) -> tl.tensor:
    """int32, ascending as z descends."""
    return z.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _deepest(log_min_p: tl.tensor) -> tl.tensor:
    """What min-p leaves is no deeper."""
    return tl.minimum(depth_of(log_min_p), _DEEPEST)


@triton.jit
def _searched(heat: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, vocab: tl.tensor) -> tl.tensor:
    """Whether a row is drawn from, and by more than min-p."""
    return (heat > 0) & ((top_k < vocab) | (top_p < 1.0))


@triton.jit
def _measure(
    logits: tl.tensor,  # [rows, vocab] fp32
    maxima: tl.tensor,  # [rows, blocks] fp32
    temperature: tl.tensor,  # [rows] fp32
    log_min_p: tl.tensor,  # [rows] fp32
    top_k: tl.tensor,  # [rows] int64
    top_p: tl.tensor,  # [rows] fp64
    counts: tl.tensor,  # [rows, blocks, ways] int32, written
    masses: tl.tensor,  # [rows, blocks, ways] fp32, written
    totals: tl.tensor,  # [rows, blocks] fp64, written: the whole mass
    vocab: tl.tensor,
    blocks: tl.tensor,
    size: tl.constexpr,  # of a block, tokens
    room: tl.constexpr,
    ways: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    row, block = tl.program_id(0), tl.program_id(1)
    heat = tl.load(temperature + row)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    if _searched(heat, k, p, vocab):
        top = row_maximum(maxima, row, blocks, room)
        deepest = _deepest(tl.load(log_min_p + row))
        way = tl.arange(0, ways)
        bounds = _FIRST + way * _STEP
        count = tl.zeros((ways, tile), tl.int32)
        mass = tl.zeros((ways, tile), tl.float32)
        total = tl.zeros((tile,), tl.float64)
        for start in range(block * size, block * size + size, tile):
            at = start + tl.arange(0, tile)
            x = tl.load(
                logits + row.to(tl.int64) * vocab + at, mask=at < vocab, other=-float("inf")
            )
            z = scaled(x, top, heat)
            depth = depth_of(z)
            left = depth <= deepest
            within = (depth[None, :] <= bounds[:, None]) & left[None, :]
            count += within.to(tl.int32)
            mass += tl.where(within, tl.exp(z)[None, :], 0.0)
            if k >= vocab:
                total += tl.where(left, tl.exp(z.to(tl.float64)), 0.0)
        at = row * blocks + block
        tl.store(counts + at * ways + way, tl.sum(count, 1))
        tl.store(masses + at * ways + way, tl.sum(mass, 1))
        tl.store(totals + at, tl.sum(total, 0))


@triton.jit
def _collect(
    logits: tl.tensor,
    maxima: tl.tensor,
    temperature: tl.tensor,
    log_min_p: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    counts: tl.tensor,
    masses: tl.tensor,
    values: tl.tensor,  # [rows, capacity] fp32, written: logits of the candidates, by id
    ids: tl.tensor,  # [rows, capacity] int32, written
    found: tl.tensor,  # [rows] int32, written: how many there are; a list takes `capacity`
    floor: tl.tensor,  # [rows] int32, written: no candidate is deeper
    vocab: tl.tensor,
    blocks: tl.tensor,
    size: tl.constexpr,
    room: tl.constexpr,
    ways: tl.constexpr,
    capacity: tl.constexpr,
) -> None:
    row, block = tl.program_id(0), tl.program_id(1)
    heat = tl.load(temperature + row)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    if _searched(heat, k, p, vocab):
        way, every = tl.arange(0, ways), tl.arange(0, room)
        at = (row * blocks + every[:, None]) * ways + way[None, :]
        count = tl.load(counts + at, mask=every[:, None] < blocks, other=0)
        mass = tl.sum(tl.load(masses + at, mask=every[:, None] < blocks, other=0.0), 0)
        # What top-p leaves is among what top-k leaves.
        wanted = tl.max(mass, 0) * p.to(tl.float32) * _CERTAIN
        enough = ((k < vocab) & (tl.sum(count, 0) >= k)) | ((k >= vocab) & (mass >= wanted))
        chosen = tl.minimum(tl.sum((~enough).to(tl.int32), 0), ways - 1)
        of_block = tl.sum(tl.where(way[None, :] == chosen, count, 0), 1)
        whole = tl.sum(of_block, 0)
        bound = tl.minimum(_FIRST + chosen * _STEP, _deepest(tl.load(log_min_p + row)))
        if block == 0:
            tl.store(found + row, whole)
            tl.store(floor + row, bound)
        own = tl.sum(tl.where(every == block, of_block, 0), 0)
        if (own > 0) & (whole <= capacity):
            before = tl.sum(tl.where(every < block, of_block, 0), 0)
            top = row_maximum(maxima, row, blocks, room)
            token = block * size + tl.arange(0, size)
            x = tl.load(
                logits + row.to(tl.int64) * vocab + token, mask=token < vocab, other=-float("inf")
            )
            kept = depth_of(scaled(x, top, heat)) <= bound
            place = row.to(tl.int64) * capacity + before + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(values + place, x, mask=kept)
            tl.store(ids + place, token, mask=kept)


@triton.jit
def _find(
    logits: tl.tensor,
    maxima: tl.tensor,
    temperature: tl.tensor,
    log_min_p: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    totals: tl.tensor,
    values: tl.tensor,
    ids: tl.tensor,
    found: tl.tensor,
    floor: tl.tensor,
    depth: tl.tensor,  # [rows] int32, written
    token: tl.tensor,  # [rows] int32, written
    vocab: tl.tensor,
    blocks: tl.tensor,
    room: tl.constexpr,
    ways: tl.constexpr,
    tile: tl.constexpr,
    capacity: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    heat = tl.load(temperature + row)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    edge = _deepest(tl.load(log_min_p + row))
    last = vocab
    if _searched(heat, k, p, vocab):
        top = row_maximum(maxima, row, blocks, room)
        edge = tl.load(floor + row)
        n = tl.load(found + row)
        listed = n <= capacity
        if listed:
            x = values + row.to(tl.int64) * capacity
        else:
            x = logits + row.to(tl.int64) * vocab
            n = vocab
        if k < vocab:
            edge = _first(x, n, top, heat, edge, k.to(tl.int32), 0, False, False, ways, tile)
        if p < 1.0:
            way = tl.arange(0, ways)
            if k < vocab:
                total = tl.max(_masses(x, n, top, heat, edge + way * 0, ways, tile), 0)
            else:
                every = tl.arange(0, room)
                part = tl.load(totals + row * blocks + every, mask=every < blocks, other=0.0)
                total = tl.sum(part, 0)
            wanted = p * total
            edge = _first(x, n, top, heat, edge, wanted, 0, True, False, ways, tile)
            # Of equally deep tokens those stay before which the mass is too little.
            bounds = edge - (way == 0).to(tl.int32)
            mass = _masses(x, n, top, heat, bounds, ways, tile)
            count = _counts(x, n, top, heat, bounds, edge, False, ways, tile)
            before = tl.min(mass, 0)
            ties = tl.max(count, 0) - tl.min(count, 0)
            each = tl.exp(-edge.to(tl.float32, bitcast=True).to(tl.float64))
            stay = tl.minimum((wanted - before) / each, ties.to(tl.float64)).to(tl.int32)
            stay += (before + stay * each < wanted).to(tl.int32)
            if stay < ties:
                last = _first(x, n, top, heat, n - 1, stay, edge, False, True, ways, tile)
                if listed:
                    last = tl.load(ids + row.to(tl.int64) * capacity + last)
    tl.store(depth + row, edge)
    tl.store(token + row, last)


@triton.jit
def _first(
    x: tl.tensor,  # [n] logits
    n: tl.tensor,
    top: tl.tensor,
    heat: tl.tensor,
    high: tl.tensor,
    wanted: tl.tensor,
    edge: tl.tensor,
    by_mass: tl.constexpr,
    of_ties: tl.constexpr,
    ways: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    """The lowest bound up to which there is as much as wanted, `high` if none is lower: a depth, by
    number of tokens or by mass; of ties a place in the list, by number of tokens as deep as
    `edge`."""
    low = high * 0
    while low < high:
        width = (high - low) // ways + 1
        bounds = tl.minimum(low + (tl.arange(0, ways) + 1) * width - 1, high)
        if by_mass:
            short = _masses(x, n, top, heat, bounds, ways, tile) < wanted
        else:
            short = _counts(x, n, top, heat, bounds, edge, of_ties, ways, tile) < wanted
        low = tl.minimum(low + tl.sum(short.to(tl.int32), 0) * width, high)
        high = tl.minimum(low + width - 1, high)
    return low


@triton.jit
def _counts(
    x: tl.tensor,
    n: tl.tensor,
    top: tl.tensor,
    heat: tl.tensor,
    bounds: tl.tensor,  # [ways] int32
    edge: tl.tensor,
    of_ties: tl.constexpr,
    ways: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    """[ways] int32: tokens no deeper than each bound, or tokens as deep as `edge` that are no
    further down the list."""
    count = tl.zeros((ways, tile), tl.int32)
    for start in range(0, n, tile):
        at = start + tl.arange(0, tile)
        z = scaled(tl.load(x + at, mask=at < n, other=-float("inf")), top, heat)
        place = depth_of(z)
        if of_ties:
            place = tl.where(place == edge, at, _NEVER)
        count += (place[None, :] <= bounds[:, None]).to(tl.int32)
    return tl.sum(count, 1)


@triton.jit
def _masses(
    x: tl.tensor,
    n: tl.tensor,
    top: tl.tensor,
    heat: tl.tensor,
    bounds: tl.tensor,
    ways: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    """[ways] fp64: the mass of the tokens no deeper than each bound."""
    mass = tl.zeros((ways, tile), tl.float64)
    for start in range(0, n, tile):
        at = start + tl.arange(0, tile)
        z = scaled(tl.load(x + at, mask=at < n, other=-float("inf")), top, heat)
        within = depth_of(z)[None, :] <= bounds[:, None]
        mass += tl.where(within, tl.exp(z.to(tl.float64))[None, :], 0.0)
    return tl.sum(mass, 1)
