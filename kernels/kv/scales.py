"""`HeadScales`: powers of two by which heads' keys and values are divided before they are stored.

Eight-bit floats have a range: beyond 448 they saturate, and below 2^-6 they lose bits. Within it
their error is relative, so all that a scale has to do is bring a head's numbers there. One that is
a power of two rounds nothing itself. A head's scale is one for all tokens, found beforehand, so a
page takes no room for it and a token's codes still depend on that token alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from kernels.kv.table import LARGEST_E4M3

HEADROOM = 2.0  # how much larger than any number seen those of other texts may be
MOST = 64  # the largest exponent either way: far beyond any model, and in fp32 still exact


@dataclass(frozen=True, slots=True, eq=False)
class HeadScales:
    """Exponents: each [layers, kv_heads], or [kv_heads] of one layer, int64 on the CPU."""

    keys: Tensor
    values: Tensor

    @property
    def name(self) -> str:
        digest = sha256(b"".join(x.numpy().tobytes() for x in (self.keys, self.values)))
        return f"x{digest.hexdigest()[:16]}"

    def layer(self, index: int) -> HeadScales:
        return HeadScales(self.keys[index], self.values[index])

    def part(self, index: int, pieces: int) -> HeadScales:
        """Piece `index` of `pieces` of the KV heads."""
        return HeadScales(self.keys.chunk(pieces, -1)[index], self.values.chunk(pieces, -1)[index])


def scale_exponents(largest: Tensor) -> Tensor:
    """largest: [...], the largest absolute value seen -> log2 of the smallest scale that lets
    values `HEADROOM` times as large be stored, int64 on the CPU; 0 for a head of zeros."""
    bound = largest.double().cpu() * HEADROOM / LARGEST_E4M3
    mantissa, exponent = torch.frexp(bound)  # the mantissa is in [0.5, 1): a power of two is 0.5
    found = torch.where(mantissa == 0.5, exponent - 1, exponent).long()
    return torch.where(bound > 0, found.clamp(-MOST, MOST), 0)
