"""What the Triton kernels of packed pages know at compile time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.kv.codec import Affine, Codec
from kernels.kv.paged import Paged
from kernels.kv.sealed import Sealed
from kernels.kv.table import Float8

SMALLEST_RUN = 16  # dimensions: what a matrix product takes
LARGEST_SEALED = 64  # positions of a page that one program encodes, and of a tile that is read


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is compiled, apart from its types."""

    constants: dict[str, int | float]
    warps: int
    stages: int


def layout_constants(paged: Paged) -> dict[str, int | float]:
    """Constants of both kernels of affine codes. Raises ValueError for what they do not take."""
    head_dim, keys, values = paged.head_dim, affine(paged.keys), affine(paged.values)
    found = places(paged)
    for codec in (keys, values):
        runs = 8 // min(codec.bits, 4)
        if head_dim // runs < SMALLEST_RUN or runs % codec.groups(head_dim):
            raise ValueError(f"these kernels do not take {codec.name} of {head_dim} numbers")
    return {
        **found,
        "key_bits": keys.bits,
        "key_groups": keys.groups(head_dim),
        "value_bits": values.bits,
        "value_groups": values.groups(head_dim),
    }


def sealed_constants(sealed: Sealed) -> dict[str, int | float]:
    """As `layout_constants`, of pages that are sealed, whose keys have no groups of dimensions; and
    `sealed`, the positions that share a channel's scale. Raises ValueError as that does."""
    kv_heads, page_size, head_dim = sealed.shape
    group = sealed.page.codec.group
    powers = all(size & (size - 1) == 0 for size in (page_size, head_dim, group))
    runs, groups = 4, head_dim // group
    if not powers or page_size > LARGEST_SEALED or group > LARGEST_SEALED:
        raise ValueError(f"these kernels do not seal pages of {page_size} tokens of {head_dim}")
    if head_dim // runs < SMALLEST_RUN or runs % groups:
        raise ValueError(f"these kernels do not take groups of {group} of {head_dim} numbers")
    value_start, norms_start, key_numbers, value_numbers = sealed.page.starts
    return {
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "page_size": page_size,
        "key_bits": 2,
        "key_groups": 0,
        "value_bits": 2,
        "value_groups": groups,
        "value_start": value_start,
        "numbers_start": value_numbers,
        "key_low_start": 0,
        "value_low_start": 0,
        "sealed": group,
        "norms_start": norms_start,
        "key_numbers_start": key_numbers,
    }


def are_floats(paged: Paged) -> bool:
    """Whether keys and values are eight-bit floats."""
    return isinstance(paged.keys, Float8) and isinstance(paged.values, Float8)


def places(paged: Paged) -> dict[str, int | float]:
    """Where things lie in a page. Raises ValueError for heads that no kernel takes."""
    head_dim, layout = paged.head_dim, paged.layout
    if head_dim & (head_dim - 1):
        raise ValueError(f"these kernels take heads of a power of two, not of {head_dim} numbers")
    _, value_start, numbers_start, key_low, value_low, _ = layout.starts
    return {
        "kv_heads": layout.kv_heads,
        "head_dim": head_dim,
        "page_size": layout.page_size,
        "value_start": value_start,
        "numbers_start": numbers_start,
        "key_low_start": key_low,
        "value_low_start": value_low,
    }


def affine(codec: Codec) -> Affine:
    if not isinstance(codec, Affine):
        raise ValueError(f"these kernels read affine codes, not {codec.name}")
    return codec


def dense_heads(x: Tensor) -> Tensor:
    """x: [tokens, heads, head_dim], as a view if only the distance of tokens is unusual."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
