"""Writing packed pages, as a Triton kernel: `Paged.append` in one pass.

The key's mean is subtracted, both are rotated by butterflies in the torch form's order, their scale
and zero are found, and codes are packed and scattered to their slots. Eight-bit floats are divided
by their head's scale instead, and rounded. The bytes are those of the torch form.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.kv.codec import LARGEST, MOST_GROWTH
from kernels.kv.paged import Paged
from kernels.kv.rotation_triton import hadamard, hadamard_constants, signs_on
from kernels.kv.sealed import Sealed
from kernels.kv.table import LARGEST_E4M3
from kernels.kv.triton_launch import (
    Launch,
    affine,
    are_floats,
    dense_heads,
    layout_constants,
    places,
)
from kernels.kv.windows import DensePages

APPEND_ROWS = 16  # keys, and values, that one program encodes
# Of what has no codes of so many bits.
_NOTHING: dict[str, int | float] = {
    f"{side}_{kind}": 0
    for side in ("key", "value")
    for kind in ("bits", "groups", "clip", "halvings")
}


def append(
    paged: Paged,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    kv_slots: Tensor,
    copies: DensePages | None = None,
) -> None:
    """As `Paged.append`: k, v: [tokens, kv_heads, head_dim]; kv: [pages, bytes] uint8, written in
    place; kv_slots: [tokens] int64. Does not synchronise with the host, but for the first call's
    copying of the signs, the mean and the scales. Raises ValueError for codecs and heads that the
    kernels do not take."""
    if k.numel() == 0:
        return
    launch_append(
        paged,
        None if paged.scales is None else paged.scales_on(k.device),
        k,
        v,
        kv,
        kv_slots,
        copies,
    )


def launch_append(
    form: Paged | Sealed,
    scales: Tensor | None,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    kv_slots: Tensor,
    copies: DensePages | None,
) -> None:
    """As `append`; scales: [2, kv_heads, 1] fp32, of heads."""
    tokens, kv_heads, head_dim = k.shape
    launch = append_launch(form)
    pages, copy_slots = kv, kv_slots  # not followed where there are no windows
    if form.windows is not None:
        assert copies is not None
        pages, copy_slots = form.dense(kv, copies.count, k.dtype), copies.slots
    k, v = dense_heads(k), dense_heads(v)
    _append[(triton.cdiv(tokens * kv_heads, APPEND_ROWS),)](
        k,
        v,
        kv,
        kv_slots,
        kv if form.key_mean is None else form.mean_on(k.device),
        kv if form.rotation is None else signs_on(head_dim, k.device),
        pages,
        copy_slots,
        scales,
        tokens,
        k.stride(0),
        v.stride(0),
        kv.stride(0),
        **launch.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
        # A fused multiply-add would round other numbers than the torch form.
        enable_fp_fusion=False,
    )


def append_launch(form: Paged | Sealed) -> Launch:
    """Of `Sealed`, what writes dense copies alone; see `seal_triton`."""
    if isinstance(form, Sealed):
        written = _copy_constants(form)
    elif are_floats(form):
        written = _float_constants(form)
    else:
        written = _affine_constants(form)
    constants = {
        **written,
        **hadamard_constants(form.head_dim),
        "rotated": form.rotation is not None,
        "with_mean": form.key_mean is not None,
        "with_copies": form.windows is not None,
        "most_growth": MOST_GROWTH,
        "block": APPEND_ROWS,
    }
    return Launch(constants, warps=4, stages=1)


def _affine_constants(paged: Paged) -> dict[str, int | float]:
    keys, values, head_dim = affine(paged.keys), affine(paged.values), paged.head_dim
    return {
        **layout_constants(paged),
        "key_clip": keys.clip,
        "value_clip": values.clip,
        "key_halvings": (head_dim // keys.groups(head_dim)).bit_length() - 1,
        "value_halvings": (head_dim // values.groups(head_dim)).bit_length() - 1,
        "largest": LARGEST,
    }


def _float_constants(paged: Paged) -> dict[str, int | float]:
    """No bits of a code are packed, and no numbers lie beside it."""
    return {**places(paged), **_NOTHING, "largest": LARGEST_E4M3}


def _copy_constants(sealed: Sealed) -> dict[str, int | float]:
    kv_heads, page_size, head_dim = sealed.shape
    sizes = {"kv_heads": kv_heads, "page_size": page_size, "head_dim": head_dim}
    starts = ("value_start", "numbers_start", "key_low_start", "value_low_start", "largest")
    return {**sizes, **dict.fromkeys(starts, 0), **_NOTHING, "key_bits": -1}


@triton.jit(do_not_specialize=["tokens"])
def _append(
    k: tl.tensor,  # [tokens, kv_heads, head_dim]
    v: tl.tensor,
    kv: tl.tensor,  # [pages, bytes] uint8, written
    kv_slots: tl.tensor,  # [tokens] int64
    key_mean: tl.tensor,  # [kv_heads, head_dim]
    signs: tl.tensor,  # [head_dim] fp32
    copies: tl.tensor,  # [dense pages, 2, kv_heads, page_size, head_dim], written
    copy_slots: tl.tensor,  # [tokens] int64
    head_scales: tl.tensor | None,  # [2, kv_heads] fp32, of floats
    tokens: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    page_stride: tl.tensor,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    page_size: tl.constexpr,
    key_bits: tl.constexpr,  # 0: eight-bit floats; -1: dense copies alone; and so of values
    key_groups: tl.constexpr,
    value_bits: tl.constexpr,
    value_groups: tl.constexpr,
    value_start: tl.constexpr,
    numbers_start: tl.constexpr,
    key_low_start: tl.constexpr,
    value_low_start: tl.constexpr,
    rotated: tl.constexpr,
    with_mean: tl.constexpr,
    with_copies: tl.constexpr,
    stages: tl.constexpr,
    norm: tl.constexpr,
    key_clip: tl.constexpr,
    value_clip: tl.constexpr,
    key_halvings: tl.constexpr,
    value_halvings: tl.constexpr,
    largest: tl.constexpr,  # number: of a scale or zero, or of floats
    most_growth: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    token, head = row // kv_heads, row % kv_heads
    valid = token < tokens
    dim = tl.arange(0, head_dim)
    slot = tl.load(kv_slots + token, mask=valid, other=0)
    place = head * page_size + slot % page_size  # in the planes of its page
    page = kv + slot // page_size * page_stride
    numbers = 4 * (key_groups + value_groups)  # bytes of a position
    if with_copies:
        to = tl.load(copy_slots + token, mask=valid, other=0)
        copy = (to // page_size * (2 * kv_heads) + head) * page_size + to % page_size
        copy_at = copies + (copy * head_dim)[:, None] + dim[None, :]

    at = head[:, None] * head_dim + dim[None, :]
    x = tl.load(k + (token * k_stride)[:, None] + at, mask=valid[:, None], other=0.0)
    x = x.to(tl.float32)
    if with_mean:
        x -= tl.load(key_mean + at).to(tl.float32)
    if rotated:
        x = hadamard(x * tl.load(signs + dim)[None, :], block, head_dim, stages, norm)
    if with_copies:
        tl.store(copy_at, x.to(copies.dtype.element_ty), mask=valid[:, None])
    if key_bits == 0:
        if head_scales is not None:
            x = _divide(x, tl.load(head_scales + head), block)
        _write_floats(x, page, place, valid, head_dim, largest)
    elif key_bits > 0:
        write(
            x,
            page,
            place,
            valid,
            numbers_start + place * numbers,
            0,
            key_low_start,
            block,
            head_dim,
            key_bits,
            key_groups,
            key_clip,
            key_halvings,
            largest,
            most_growth,
        )
    x = tl.load(v + (token * v_stride)[:, None] + at, mask=valid[:, None], other=0.0)
    x = x.to(tl.float32)
    if rotated:
        x = hadamard(x * tl.load(signs + dim)[None, :], block, head_dim, stages, norm)
    if with_copies:
        copy_at += kv_heads * page_size * head_dim
        tl.store(copy_at, x.to(copies.dtype.element_ty), mask=valid[:, None])
    if key_bits == 0:
        if head_scales is not None:
            x = _divide(x, tl.load(head_scales + kv_heads + head), block)
        _write_floats(x, page + value_start, place, valid, head_dim, largest)
    elif key_bits > 0:
        write(
            x,
            page,
            place,
            valid,
            numbers_start + place * numbers + 4 * key_groups,
            value_start,
            value_low_start,
            block,
            head_dim,
            value_bits,
            value_groups,
            value_clip,
            value_halvings,
            largest,
            most_growth,
        )


@triton.jit
def _divide(x: tl.tensor, scale: tl.tensor, rows: tl.constexpr) -> tl.tensor:
    """x: [rows, n] fp32; scale: [rows], powers of two, by whose inverse products are exact."""
    inverse = tl.div_rn(tl.full((rows,), 1.0, tl.float32), scale)
    return x * inverse[:, None]


@triton.jit
def _write_floats(
    x: tl.tensor,  # [rows, n] fp32
    plane: tl.tensor,  # [rows] pointers
    place: tl.tensor,  # [rows] of the plane
    valid: tl.tensor,  # [rows]
    n: tl.constexpr,
    largest: tl.constexpr,
) -> None:
    """As `Float8.encode`."""
    x = tl.clamp(x, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    codes = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    at = (plane + place * n)[:, None] + tl.arange(0, n)[None, :]
    tl.store(at, codes, mask=valid[:, None])


@triton.jit
def write(
    x: tl.tensor,  # [rows, n] fp32
    page: tl.tensor,  # [rows] pointers
    place: tl.tensor,  # [rows] of the plane
    valid: tl.tensor,  # [rows]
    numbers_at: tl.tensor,  # [rows], bytes
    start: tl.constexpr,
    low_start: tl.constexpr,
    rows: tl.constexpr,
    n: tl.constexpr,
    bits: tl.constexpr,
    groups: tl.constexpr,
    clip: tl.constexpr,
    halvings: tl.constexpr,
    largest: tl.constexpr,
    most_growth: tl.constexpr,
) -> None:
    """As `Affine.encode`, operation by operation."""
    count: tl.constexpr = 1 << bits
    parts = tl.reshape(x, (rows, groups, n // groups))
    if clip > 0:
        rms = tl.sqrt_rn(squares(parts, rows, groups, n // groups, halvings) * (groups / n))
        scale, zero = rms * (2 * clip / (count - 1)), rms * -clip
    else:
        lowest, highest = tl.min(parts, 2), tl.max(parts, 2)
        scale = (highest - lowest) * (1.0 / count)
        zero = lowest + scale * 0.5
    # Codes are chosen by 16-bit numbers, as if those were to be read.
    scale = tl.minimum(scale, largest).to(tl.float16).to(tl.float32)
    zero = tl.minimum(tl.maximum(zero, -largest), largest).to(tl.float16).to(tl.float32)
    one = tl.full((rows, groups), 1.0, tl.float32)
    inverse = tl.where(scale > 0, tl.div_rn(one, tl.where(scale > 0, scale, 1.0)), 0.0)
    codes = (parts - zero[:, :, None]) * inverse[:, :, None]
    codes = tl.minimum(tl.maximum(codes, 0.0), count - 1.0)
    # Rounds halves to even: next to this number the distance of floats is 1.
    codes = (codes + 12582912.0) - 12582912.0
    if bits < 8:
        decoded = codes * scale[:, :, None] + zero[:, :, None]
        length = squares(decoded, rows, groups, n // groups, halvings)
        by = squares(parts, rows, groups, n // groups, halvings)
        by = tl.sqrt_rn(tl.div_rn(by, tl.where(length > 0, length, 1.0)))
        by = tl.where(length > 0, tl.minimum(by, most_growth), 1.0)
        scale = tl.minimum(scale * by, largest)
        zero = tl.minimum(tl.maximum(zero * by, -largest), largest)
    at = (page + numbers_at).to(tl.pointer_type(tl.float16))[:, None] + 2 * tl.arange(0, groups)
    tl.store(at, scale.to(tl.float16), mask=valid[:, None])
    tl.store(at + 1, zero.to(tl.float16), mask=valid[:, None])

    flat = tl.reshape(codes.to(tl.int32), (rows, n))
    if bits == 8:
        _store_plane(flat >> 4, page + start, place, valid, rows, n, 4)
        _store_plane(flat & 15, page + low_start, place, valid, rows, n, 4)
    else:
        _store_plane(flat, page + start, place, valid, rows, n, bits)


@triton.jit
def squares(
    x: tl.tensor,  # [rows, groups, n]
    rows: tl.constexpr,
    groups: tl.constexpr,
    n: tl.constexpr,
    halvings: tl.constexpr,
) -> tl.tensor:
    """[rows, groups]: sums of squares in the order of `codec.squares`, for the same bits."""
    terms = x * x
    for i in tl.static_range(halvings):
        halves = tl.reshape(terms, (rows, groups, 2, n >> (i + 1)))
        low, high = tl.split(tl.permute(halves, (0, 1, 3, 2)))
        terms = low + high
    return tl.reshape(terms, (rows, groups))


@triton.jit
def _store_plane(
    codes: tl.tensor,  # [rows, n] int32
    plane: tl.tensor,  # [rows] pointers
    place: tl.tensor,
    valid: tl.tensor,
    rows: tl.constexpr,
    n: tl.constexpr,
    bits: tl.constexpr,
) -> None:
    runs: tl.constexpr = 8 // bits
    size: tl.constexpr = n // runs
    shifts = tl.arange(0, runs) * bits
    packed = tl.sum(tl.reshape(codes, (rows, runs, size)) << shifts[None, :, None], 1)
    at = (plane + place * size)[:, None] + tl.arange(0, size)[None, :]
    tl.store(at, packed.to(tl.uint8), mask=valid[:, None])
