"""Writing pages that are sealed, as Triton kernels: `Sealed.append`.

The kernel of the other formats writes dense copies; another one encodes the pages whose last
position is among the tokens, each head of a page by a program. The bytes are those of the torch
form.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.kv.append_triton import launch_append, squares, write
from kernels.kv.codec import LARGEST, MOST_GROWTH
from kernels.kv.sealed import Sealed
from kernels.kv.triton_launch import Launch, sealed_constants
from kernels.kv.windows import DensePages


def append(
    sealed: Sealed, k: Tensor, v: Tensor, kv: Tensor, kv_slots: Tensor, copies: DensePages
) -> None:
    """As `Sealed.append`: k, v: [tokens, kv_heads, head_dim]; kv: [pages, bytes] uint8, written in
    place; kv_slots: [tokens] int64. Does not synchronise with the host, for the device finds out
    whether a page is full, but for the first call's copying of the signs and the mean. Raises
    ValueError for pages and heads that the kernels do not take."""
    tokens, kv_heads, _ = k.shape
    if tokens == 0:
        return
    launch = seal_launch(sealed)
    launch_append(sealed, None, k, v, kv, kv_slots, copies)
    _seal[(tokens, kv_heads)](
        kv,
        kv_slots,
        sealed.dense(kv, copies.count, k.dtype),
        copies.slots,
        kv.stride(0),
        **launch.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=False,  # for the torch form's bits
    )


def seal_launch(sealed: Sealed) -> Launch:
    """Raises ValueError for pages and heads that the kernels do not take."""
    found = sealed_constants(sealed)
    _, page_size, head_dim = sealed.shape
    names = ("kv_heads", "head_dim", "page_size", "value_start", "norms_start")
    constants = {name: found[name] for name in names} | {
        "group": found["sealed"],
        "key_numbers_start": found["key_numbers_start"],
        "value_numbers_start": found["numbers_start"],
        "halvings": head_dim.bit_length() - 1,
        "group_halvings": int(found["sealed"]).bit_length() - 1,
        "largest": LARGEST,
        "most_growth": MOST_GROWTH,
    }
    return Launch(constants, warps=8 if page_size * head_dim > 4096 else 4, stages=1)


@triton.jit
def _seal(
    kv: tl.tensor,  # [pages, bytes] uint8, written
    kv_slots: tl.tensor,  # [tokens] int64
    copies: tl.tensor,  # [dense pages, 2, kv_heads, page_size, head_dim]
    copy_slots: tl.tensor,  # [tokens] int64
    page_stride: tl.tensor,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    page_size: tl.constexpr,
    value_start: tl.constexpr,
    norms_start: tl.constexpr,
    key_numbers_start: tl.constexpr,
    value_numbers_start: tl.constexpr,
    group: tl.constexpr,
    halvings: tl.constexpr,
    group_halvings: tl.constexpr,
    largest: tl.constexpr,
    most_growth: tl.constexpr,
) -> None:
    """As `SealedPage.encode`, of one head of a token's page, if the token is the page's last."""
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(kv_slots + token)
    if (slot % page_size < page_size - 1) | (slot < page_size):
        return
    page = kv + slot // page_size * page_stride
    at, dim = tl.arange(0, page_size), tl.arange(0, head_dim)
    copy = (tl.load(copy_slots + token) // page_size * (2 * kv_heads) + head) * page_size
    from_at = copies + copy * head_dim + (at * head_dim)[:, None] + dim[None, :]

    x = tl.load(from_at).to(tl.float32)
    parts = tl.reshape(x, (page_size, 1, head_dim))
    norm = tl.sqrt_rn(squares(parts, page_size, 1, head_dim, halvings))
    norm = tl.minimum(tl.reshape(norm, (page_size,)), largest).to(tl.float16)
    place = head * page_size + at
    tl.store((page + norms_start).to(tl.pointer_type(tl.float16)) + place, norm)
    # Divided by what will be read.
    by = tl.broadcast_to(norm.to(tl.float32)[:, None], (page_size, head_dim))
    unit = tl.where(by > 0, tl.div_rn(x, tl.where(by > 0, by, 1.0)), 0.0)
    channel = head * head_dim + dim
    numbers: tl.constexpr = 4 * (page_size // group)  # bytes of a channel
    write(
        tl.trans(unit),
        page + tl.zeros_like(dim),
        channel,
        dim >= 0,
        key_numbers_start + channel * numbers,
        0,
        0,
        head_dim,
        page_size,
        2,
        page_size // group,
        0.0,
        group_halvings,
        largest,
        most_growth,
    )
    x = tl.load(from_at + kv_heads * page_size * head_dim).to(tl.float32)
    write(
        x,
        page + tl.zeros_like(at),
        place,
        at >= 0,
        value_numbers_start + place * (4 * (head_dim // group)),
        value_start,
        0,
        page_size,
        head_dim,
        2,
        head_dim // group,
        0.0,
        group_halvings,
        largest,
        most_growth,
    )
