"""Codes of 2, 3, 4 and 8 bits in bytes.

Byte j of a plane of 4-bit codes holds code j in its low half and code j + n/2 in its high half, and
so on for fewer bits: a byte's parts belong to equally long runs of dimensions, so that a kernel
multiplies runs of a query by them without shuffling. Three bits are a plane of two and one of one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(bits: int, n: int) -> int:
    """Of n codes; n must be a multiple of 8 (of 8 / bits, but for three bits)."""
    return n * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes: [..., n] uint8, each below 2**bits -> [..., packed_bytes]."""
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=-1)
    parts = codes.unflatten(-1, (8 // bits, -1))
    packed = parts[..., 0, :].clone()
    for i in range(1, 8 // bits):
        packed |= parts[..., i, :] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    if bits == 3:
        low, high = packed.split(packed.shape[-1] // 3 * 2, dim=-1)
        return unpack(low, 2) | (unpack(high, 1) << 2)
    mask = (1 << bits) - 1
    return torch.cat([(packed >> (bits * i)) & mask for i in range(8 // bits)], dim=-1)
