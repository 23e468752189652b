"""Attention over `Paged` pages of affine codes, as Triton kernels.

Codes are multiplied as they lie: a byte's parts belong to runs of dimensions, so the query's runs
are multiplied by them one after another, and no key or value is ever put together. Scales and
zeros are applied to the scores and to the weights, once a position:

    q . key = scale * (q . codes) + zero * sum(q)
    sum p * value = sum (p * scale) * codes + sum p * zero

Keys of pages that are sealed have scales by channels, which no product can be taken out of: they
are decoded in registers, and their norms are applied to the scores.

Where there are windows, a program walks over its split twice: over what any of its rows reads
packed, then over what any reads dense, and each row sees of both what is its own.

See `kernels.attention.split` for how the work is cut.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.split import (
    FEW,
    MANY,
    TILE,
    Partials,
    launch_splits,
    near_tiles,
    positions_of,
    query_block,
    query_rows,
    recent,
    see,
    soften,
    store_lse,
)
from kernels.kv.paged import Paged
from kernels.kv.sealed import Sealed
from kernels.kv.triton_launch import Launch, layout_constants, sealed_constants
from kernels.ops import AttentionBatch, AttentionLayer
from kernels.triton_bytes import shift

STAGES = 3  # in which a tile's page numbers, then its codes, are on their way


def attend(
    q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch, split: int | None = None
) -> Partials:
    """q: [tokens, heads, head_dim], already turned; kv: [pages, bytes] uint8, of `layer.kv`.

    The outputs are still to be merged, and turned back; see `split.launch_splits`. Raises
    ValueError as `append` does.
    """
    paged = layer.kv
    if not isinstance(paged, (Paged, Sealed)):
        raise TypeError(f"these kernels read pages of codes, not of {paged.name}")
    group = layer.num_heads // layer.num_kv_heads
    windowed = layer.window is not None
    launch = attend_launch(paged, group, batch.max_query, windowed, q.dtype)
    # Pointers that are not followed where there are no windows.
    more = {"copies": kv, "copies_table": batch.page_table, "copies_stride": 0}
    if paged.windows is not None:
        assert batch.copies is not None
        table = batch.copies.table
        pages = paged.dense(kv, batch.copies.count, q.dtype)
        more = {"copies": pages, "copies_table": table, "copies_stride": table.stride(0)}
    return launch_splits(_attend, launch, q, kv, layer, batch, split, more)


def attend_launch(
    paged: Paged | Sealed, group: int, max_query: int, windowed: bool, dtype: torch.dtype
) -> Launch:
    """`group`: query heads of a KV head; `dtype`: of queries."""
    windows = paged.windows
    constants = {
        **(_sealed(paged) if isinstance(paged, Sealed) else _unsealed(paged)),
        **query_rows(max_query, group, (FEW, MANY)),
        "tile": TILE,
        "windowed": windowed,
        "sink": 0 if windows is None else windows.sink,
        "latest": 0 if windows is None else windows.block,
    }
    block = constants["block"]
    # Warps share few rows by dimensions of a run, and have the less to do for each position the
    # fewer they are; with less than sixteen dimensions, they would repeat each other's work.
    run = paged.head_dim // (4 if constants["value_bits"] == 2 else 2)
    warps = 4 if block > FEW else 2 if run >= 32 else 1
    if isinstance(paged, Sealed) and block > FEW:
        warps = 8  # keys are decoded into numbers of 32 bits, for which registers are needed
    return Launch(constants, warps * (2 if dtype == torch.float32 else 1), STAGES)


def _sealed(sealed: Sealed) -> dict[str, int | float]:
    return {**sealed_constants(sealed), "coarse": False, "half_bytes": 0}


def _unsealed(paged: Paged) -> dict[str, int | float]:
    return {
        **layout_constants(paged),
        **dict.fromkeys(("sealed", "norms_start", "key_numbers_start"), 0),
        "coarse": paged.reads_coarsely,
        "half_bytes": paged.layout.half_bytes if paged.layout.halves else 0,
    }


@triton.jit(do_not_specialize=["rows", "tokens", "table_stride", "window", "copies_stride"])
def _attend(
    q: tl.tensor,  # [tokens, heads, head_dim]
    kv: tl.tensor,  # [pages, bytes] uint8
    positions: tl.tensor,  # [tokens] int64
    query_starts: tl.tensor,  # [rows + 1] int32
    kv_lengths: tl.tensor,  # [rows] int32
    page_table: tl.tensor,  # [rows, pages] int32
    out: tl.tensor,  # [splits, tokens, heads, head_dim], written
    lse: tl.tensor,  # [splits, tokens, heads] fp32, written
    rows: tl.tensor,
    tokens: tl.tensor,
    q_stride: tl.tensor,
    page_stride: tl.tensor,
    table_stride: tl.tensor,
    split: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,  # of scores, for powers of two
    copies: tl.tensor,  # [dense pages, 2, kv_heads, page_size, head_dim], where there are windows
    copies_table: tl.tensor,  # [rows, pages] int32
    copies_stride: tl.tensor,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    page_size: tl.constexpr,
    key_bits: tl.constexpr,
    key_groups: tl.constexpr,
    value_bits: tl.constexpr,
    value_groups: tl.constexpr,
    value_start: tl.constexpr,
    numbers_start: tl.constexpr,  # where pages are sealed, of the values'
    key_low_start: tl.constexpr,
    value_low_start: tl.constexpr,
    sealed: tl.constexpr,  # positions that share a scale of a channel of keys; 0: none do
    norms_start: tl.constexpr,  # of keys, where pages are sealed
    key_numbers_start: tl.constexpr,
    coarse: tl.constexpr,
    half_bytes: tl.constexpr,  # of a page, where entries of the table may be halves; else 0
    group: tl.constexpr,
    block: tl.constexpr,  # query rows
    tile: tl.constexpr,  # positions
    whole_rows: tl.constexpr,  # a program has all tokens of a row
    windowed: tl.constexpr,
    sink: tl.constexpr,  # first positions that are read dense
    latest: tl.constexpr,  # positions of a block of text, whose own is read dense; 0: none is
) -> None:
    key_runs: tl.constexpr = 4 if key_bits == 2 else 2
    key_run: tl.constexpr = head_dim // key_runs
    value_runs: tl.constexpr = 4 if value_bits == 2 else 2
    value_run: tl.constexpr = head_dim // value_runs
    pairs: tl.constexpr = key_groups + value_groups
    block_tokens: tl.constexpr = block // group

    kv_head, part = tl.program_id(1), tl.program_id(2)
    row, first, behind = query_block(query_starts, rows, block_tokens, whole_rows)
    if first >= behind:
        return
    m = tl.arange(0, block)
    token = first + m // group
    head = kv_head * group + m % group
    valid = (m < block_tokens * group) & (token < behind)
    position, start, stop = positions_of(
        token, valid, row, part, positions, kv_lengths, split, window, tile, windowed
    )

    # All that this split looks at, and what of it is packed for any row.
    whole_start, whole_stop = start, stop
    if sink + latest > 0:
        near = recent(position, latest)  # from here on a row reads dense
        start = tl.maximum(start, sink // tile * tile)
        stop = tl.minimum(stop, tl.max(near, 0))

    q_at = q + token.to(tl.int64)[:, None] * q_stride + head[:, None] * head_dim
    run_at = q_at + tl.arange(0, key_run)[None, :]
    shown = valid[:, None]
    q0 = tl.load(run_at, mask=shown, other=0.0)
    q1 = tl.load(run_at + key_run, mask=shown, other=0.0)
    t0, t1 = tl.sum(q0.to(tl.float32), 1), tl.sum(q1.to(tl.float32), 1)
    total = t0 + t1
    if key_runs == 4:
        q2 = tl.load(run_at + 2 * key_run, mask=shown, other=0.0)
        q3 = tl.load(run_at + 3 * key_run, mask=shown, other=0.0)
        t2, t3 = tl.sum(q2.to(tl.float32), 1), tl.sum(q3.to(tl.float32), 1)
        total = (t0 + t1) + (t2 + t3)

    # Weights times scales can be too small for fp16.
    weight_type: tl.constexpr = tl.float32 if q0.dtype == tl.float32 else tl.bfloat16
    best = tl.full((block,), -1e30, tl.float32)  # finite: no infinity is taken from another
    norm = tl.zeros((block,), tl.float32)
    a0 = tl.zeros((block, value_run), tl.float32)
    a1 = tl.zeros((block, value_run), tl.float32)
    if value_runs == 4:
        a2 = tl.zeros((block, value_run), tl.float32)
        a3 = tl.zeros((block, value_run), tl.float32)

    table = page_table + row.to(tl.int64) * table_stride
    for begin in range(start, stop, tile):
        at = begin + tl.arange(0, tile)
        known = at < stop
        page = tl.load(table + at // page_size, mask=known, other=0).to(tl.int64)
        whole = page >= 0
        if half_bytes:
            tl.static_assert(pairs == 2)
            page = tl.where(whole, 2 * page, ~page) * half_bytes
        else:
            page *= page_stride
        place = kv_head * page_size + at % page_size  # in the planes of a page
        # What lies behind the row's last position may be anything, even a NaN.
        numbers_at = (kv + page + numbers_start).to(tl.pointer_type(tl.int32)) + place * pairs

        if sealed > 0:
            # Scales, each of so many positions, and codes, of a key's channels.
            first_at = begin + tl.arange(0, tile // sealed) * sealed
            there = first_at < stop
            groups = tl.load(table + first_at // page_size, mask=there, other=0).to(tl.int64)
            groups = groups * page_stride + key_numbers_start
            groups += first_at % page_size // sealed * 4
            channel = kv_head * head_dim + tl.arange(0, key_run)
            codes_at = (channel * (page_size // 4))[:, None] + page[None, :]
            groups_at = (channel * (4 * (page_size // sealed)))[:, None] + groups[None, :]
            step: tl.constexpr = key_run * (page_size // 4)  # from a run's codes to the next
            jump: tl.constexpr = key_run * 4 * (page_size // sealed)
            keys = _sealed_keys(kv + codes_at, kv + groups_at, at, there, page_size, sealed)
            scores = _dot(q0, keys.to(q0.dtype), None)
            keys = _sealed_keys(
                kv + codes_at + step, kv + groups_at + jump, at, there, page_size, sealed
            )
            scores = _dot(q1, keys.to(q0.dtype), scores)
            keys = _sealed_keys(
                kv + codes_at + 2 * step, kv + groups_at + 2 * jump, at, there, page_size, sealed
            )
            scores = _dot(q2, keys.to(q0.dtype), scores)
            keys = _sealed_keys(
                kv + codes_at + 3 * step, kv + groups_at + 3 * jump, at, there, page_size, sealed
            )
            scores = _dot(q3, keys.to(q0.dtype), scores)
            norms_at = (kv + page + norms_start).to(tl.pointer_type(tl.float16)) + place
            norms = tl.load(norms_at, mask=known, other=0.0).to(tl.float32)
            scores *= (norms * scale)[None, :]
        else:
            key_at = (page + place * key_run)[None, :] + tl.arange(0, key_run)[:, None]
            high = tl.load(kv + key_at)
            low = high
            if key_bits == 8 and not coarse:
                low = _low(kv + key_low_start + key_at, whole[None, :], half_bytes)
            s, z = _numbers(numbers_at, 0, known, key_bits, coarse)
            if half_bytes and not coarse:
                z = tl.where(whole, z, z - 0.5 * s)
            d0 = _dot(q0, _codes(high, low, 0, key_bits, coarse), None)
            if key_groups == 1:
                scores = _dot(q1, _codes(high, low, 1, key_bits, coarse), d0)
                if key_runs == 4:
                    scores = _dot(q2, _codes(high, low, 2, key_bits, coarse), scores)
                    scores = _dot(q3, _codes(high, low, 3, key_bits, coarse), scores)
                scores = scores * (s * scale)[None, :] + total[:, None] * (z * scale)[None, :]
            else:
                scores = d0 * s[None, :] + t0[:, None] * z[None, :]
                s, z = _numbers(numbers_at, key_groups // key_runs, known, key_bits, coarse)
                d1 = _dot(q1, _codes(high, low, 1, key_bits, coarse), None)
                scores += d1 * s[None, :] + t1[:, None] * z[None, :]
                if key_runs == 4:
                    s, z = _numbers(numbers_at, 2 * key_groups // key_runs, known, key_bits, coarse)
                    d2 = _dot(q2, _codes(high, low, 2, key_bits, coarse), None)
                    scores += d2 * s[None, :] + t2[:, None] * z[None, :]
                    s, z = _numbers(numbers_at, 3 * key_groups // key_runs, known, key_bits, coarse)
                    d3 = _dot(q3, _codes(high, low, 3, key_bits, coarse), None)
                    scores += d3 * s[None, :] + t3[:, None] * z[None, :]
                scores *= scale

        scores = see(scores, at, known, position, window, windowed)
        if sink + latest > 0:
            packed = (at >= sink)[None, :] & (at[None, :] < near[:, None])
            scores = tl.where(packed, scores, -float("inf"))
        weights, decay, best, norm = soften(scores, best, norm)

        value_at = (page + place * value_run)[:, None] + tl.arange(0, value_run)[None, :]
        high = tl.load(kv + value_start + value_at)
        low = high
        if value_bits == 8 and not coarse:
            low = _low(kv + value_low_start + value_at, whole[:, None], half_bytes)
        numbers_at += key_groups
        s, z = _numbers(numbers_at, 0, known, value_bits, coarse)
        if half_bytes and not coarse:
            z = tl.where(whole, z, z - 0.5 * s)
        scaled = (weights * s[None, :]).to(weight_type)
        zeros = tl.sum(weights * z[None, :], 1)
        a0 = a0 * decay[:, None] + zeros[:, None]
        a0 = _dot(scaled, _codes(high, low, 0, value_bits, coarse), a0)
        if value_groups > 1:
            s, z = _numbers(numbers_at, value_groups // value_runs, known, value_bits, coarse)
            scaled = (weights * s[None, :]).to(weight_type)
            zeros = tl.sum(weights * z[None, :], 1)
        a1 = a1 * decay[:, None] + zeros[:, None]
        a1 = _dot(scaled, _codes(high, low, 1, value_bits, coarse), a1)
        if value_runs == 4:
            if value_groups > 1:
                s, z = _numbers(
                    numbers_at, 2 * value_groups // value_runs, known, value_bits, coarse
                )
                scaled = (weights * s[None, :]).to(weight_type)
                zeros = tl.sum(weights * z[None, :], 1)
            a2 = a2 * decay[:, None] + zeros[:, None]
            a2 = _dot(scaled, _codes(high, low, 2, value_bits, coarse), a2)
            if value_groups > 1:
                s, z = _numbers(
                    numbers_at, 3 * value_groups // value_runs, known, value_bits, coarse
                )
                scaled = (weights * s[None, :]).to(weight_type)
                zeros = tl.sum(weights * z[None, :], 1)
            a3 = a3 * decay[:, None] + zeros[:, None]
            a3 = _dot(scaled, _codes(high, low, 3, value_bits, coarse), a3)

    if sink + latest > 0:
        first_near, sinks, blocks_start, tiles = near_tiles(
            near, valid, whole_start, whole_stop, sink, latest, tile
        )
        table = copies_table + row.to(tl.int64) * copies_stride
        for i in range(0, tiles):
            begin = tl.where(i < sinks, whole_start + i * tile, blocks_start + (i - sinks) * tile)
            at = begin + tl.arange(0, tile)
            # What no row reads dense may have no copy: the null page holds anything.
            known = (at < whole_stop) & ((at < sink) | (at >= first_near))
            page = tl.load(table + at // page_size, mask=known, other=0).to(tl.int64)
            place = (page * (2 * kv_heads) + kv_head) * page_size + at % page_size
            key_at = copies + (place * head_dim)[None, :] + tl.arange(0, key_run)[:, None]
            scores = _dot(q0, tl.load(key_at), None)
            scores = _dot(q1, tl.load(key_at + key_run), scores)
            if key_runs == 4:
                scores = _dot(q2, tl.load(key_at + 2 * key_run), scores)
                scores = _dot(q3, tl.load(key_at + 3 * key_run), scores)
            scores = see(scores * scale, at, known, position, window, windowed)
            dense = (at < sink)[None, :] | (at[None, :] >= near[:, None])
            scores = tl.where(dense, scores, -float("inf"))
            weights, decay, best, norm = soften(scores, best, norm)

            place = (place + kv_heads * page_size) * head_dim
            value_at = copies + place[:, None] + tl.arange(0, value_run)[None, :]
            read, weights = known[:, None], weights.to(q0.dtype)
            values = tl.load(value_at, mask=read, other=0.0)
            a0 = _dot(weights, values, a0 * decay[:, None])
            values = tl.load(value_at + value_run, mask=read, other=0.0)
            a1 = _dot(weights, values, a1 * decay[:, None])
            if value_runs == 4:
                values = tl.load(value_at + 2 * value_run, mask=read, other=0.0)
                a2 = _dot(weights, values, a2 * decay[:, None])
                values = tl.load(value_at + 3 * value_run, mask=read, other=0.0)
                a3 = _dot(weights, values, a3 * decay[:, None])

    out_row = (part * tokens + token).to(tl.int64) * (group * kv_heads) + head
    found, norm = store_lse(lse + out_row, best, norm, valid)
    out_at = out + (out_row * head_dim)[:, None] + tl.arange(0, value_run)[None, :]
    # What one split alone makes is the result, zeros where nothing is seen.
    written = (valid & (found | (tl.num_programs(2) == 1)))[:, None]
    kind: tl.constexpr = out.dtype.element_ty
    tl.store(out_at, (a0 / norm[:, None]).to(kind), mask=written)
    tl.store(out_at + value_run, (a1 / norm[:, None]).to(kind), mask=written)
    if value_runs == 4:
        tl.store(out_at + 2 * value_run, (a2 / norm[:, None]).to(kind), mask=written)
        tl.store(out_at + 3 * value_run, (a3 / norm[:, None]).to(kind), mask=written)


@triton.jit
def _sealed_keys(
    codes_at: tl.tensor,  # [run, tile] pointers to pages' codes of channels
    groups_at: tl.tensor,  # [run, tile / sealed] pointers to scales and zeros
    at: tl.tensor,  # [tile] positions
    there: tl.tensor,  # [tile / sealed]
    page_size: tl.constexpr,
    sealed: tl.constexpr,
) -> tl.tensor:
    """[run, tile] fp32: keys over their norms. A byte has codes of positions a fourth of the page
    apart."""
    run: tl.constexpr = codes_at.shape[0]
    tile: tl.constexpr = codes_at.shape[1]
    line: tl.constexpr = page_size // 4
    inside = at % page_size
    byte = tl.load(codes_at + (inside % line)[None, :]).to(tl.int32)
    codes = (byte >> (inside // line * 2)[None, :]) & 3
    pair = tl.load(groups_at.to(tl.pointer_type(tl.int32)), mask=there[None, :], other=0)
    s = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    z = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    codes = tl.reshape(codes.to(tl.float32), (run, tile // sealed, sealed))
    return tl.reshape(codes * s[:, :, None] + z[:, :, None], (run, tile))


@triton.jit
def _low(at: tl.tensor, whole: tl.tensor, half_bytes: tl.constexpr) -> tl.tensor:
    """Of a low plane. What stands in place of a half's are codes of 8, which is half a step more
    than the middle of the sixteen cells that its upper codes stand for."""
    return tl.load(at, mask=whole, other=136) if half_bytes else tl.load(at)


@triton.jit
def _numbers(
    at: tl.tensor, group: tl.constexpr, known: tl.tensor, bits: tl.constexpr, coarse: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Scale and zero of one group, fp32, for codes as `_codes` gives them."""
    pair = tl.load(at + group, mask=known, other=0)
    scale = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    if bits == 8 and coarse:
        zero += 127.5 * scale  # 16 * 7.5 for the code, 7.5 for the middle of its sixteen cells
    elif bits == 8:
        zero += 128.0 * scale
    else:
        zero += ((1 << bits) - 1) * 0.5 * scale
        scale *= 1.0 / (1 << (8 - bits))
    return scale, zero


@triton.jit
def _codes(
    high: tl.tensor, low: tl.tensor, run: tl.constexpr, bits: tl.constexpr, coarse: tl.constexpr
) -> tl.tensor:
    """One run's codes of packed planes, as int8: at the upper end of a byte, with half a step
    added, less 128.

    So they lie about zero, and what rounding does to a weight adds no constant to all dimensions,
    which turning back would gather in one. And they are signed: Triton turns int8 into bf16 four at
    a time by moving bytes, but each uint8 with a conversion, at a quarter of the speed or less.
    """
    if bits == 2:
        codes = (shift(high, 6 - 2 * run) & 192) ^ 160
    elif bits == 4 or coarse:
        upper = shift(high, 4) if run == 0 else high
        codes = (upper & 240) ^ 136
    elif run == 0:
        codes = ((shift(high, 4) & 240) | (low & 15)) ^ 128
    else:
        codes = ((high & 240) | (shift(low, -4) & 15)) ^ 128
    return codes.to(tl.int8, bitcast=True)


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """a: [m, k] floats; b: [k, n] codes, exact in a's type, or floats of that type; sums: [m, n]
    fp32 or None.

    fp32 is multiplied in three parts of tf32, which loses next to nothing: codes have one.
    """
    return tl.dot(a, b.to(a.dtype), acc=sums, input_precision="tf32x3")
