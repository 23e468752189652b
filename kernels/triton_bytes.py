"""Shifts of bytes in Triton, four at once."""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # which knows no assembler


@triton.jit
def shift(x: tl.tensor, left: tl.constexpr) -> tl.tensor:
    """x: uint8, shifted by 0, 2, 4 or 6 to the left, or by -2 or -4; what comes in is anything.

    Four bytes at once: the compiler does so by itself for masks, but not for shifts.
    """
    if left == 0:
        shifted = x
    elif _INTERPRETED:
        shifted = (x << left) if left > 0 else (x >> -left)
    elif left == 2:
        shifted = _word_op(x, "shl.b32 $0, $1, 2;")
    elif left == 4:
        shifted = _word_op(x, "shl.b32 $0, $1, 4;")
    elif left == 6:
        shifted = _word_op(x, "shl.b32 $0, $1, 6;")
    elif left == -2:
        shifted = _word_op(x, "shr.b32 $0, $1, 2;")
    else:
        tl.static_assert(left == -4)
        shifted = _word_op(x, "shr.b32 $0, $1, 4;")
    return shifted


@triton.jit
def _word_op(x: tl.tensor, asm: tl.constexpr) -> tl.tensor:
    return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.uint8, is_pure=True, pack=4)
