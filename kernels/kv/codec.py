"""`Codec`: one vector of a head in few bits, and the affine codec.

What a codec makes of a vector are bytes of a high plane, of a low plane (for codes of eight bits,
whose upper halves are a coarser code of the same vector) and a few 16-bit floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.kv.pack import pack, packed_bytes, unpack

LARGEST = 65504.0  # of 16-bit floats


MOST_GROWTH = 2.0  # of a code whose vector is longer than what its cells can say


def squares(x: Tensor) -> Tensor:
    """The sum of x * x over the last dimension, which stays, in an order that every kernel follows:
    the second half is added to the first until an odd number of terms is left, then one by one."""
    terms = x.square()
    while terms.shape[-1] % 2 == 0:
        low, high = terms.chunk(2, dim=-1)
        terms = low + high
    total = terms[..., :1]
    for i in range(1, terms.shape[-1]):
        total = total + terms[..., i : i + 1]
    return total


def root(x: Tensor) -> Tensor:
    """The square root, correctly rounded as kernels have it. x: fp32.

    Torch's own is one unit of the last place off for many numbers, on processors of some makers."""
    return x.double().sqrt().float()


class Sizes(NamedTuple):
    """Of one vector's code."""

    high: int  # bytes
    low: int  # bytes; 0: there is no low plane
    numbers: int  # 16-bit floats


class Code(NamedTuple):
    """Codes of vectors, [..., Sizes.high], [..., Sizes.low] uint8 and [..., Sizes.numbers] fp16."""

    high: Tensor
    low: Tensor
    numbers: Tensor


class Codec(Protocol):
    """Of vectors [..., n]; each by itself."""

    @property
    def name(self) -> str: ...

    def sizes(self, n: int) -> Sizes:
        """Raises ValueError for an n that it does not take."""
        ...

    def encode(self, x: Tensor) -> Code:
        """x: [..., n] fp32."""
        ...

    def decode(self, code: Code, coarse: bool = False) -> Tensor:
        """[..., n] fp32; `coarse`: by the high plane alone."""
        ...


@dataclass(frozen=True, slots=True)
class Affine:
    """value = zero + scale * code, with a scale and a zero for each group of dimensions.

    Eight and four bits: equal cells from the smallest to the largest number of the group, values in
    their middles, which has less error than values at both ends. Two bits: cells about zero whose
    width goes by the root mean square, since with four cells a range says little. Scale and zero
    of four bits and two are then stretched so that what is decoded is as long as the group was, as
    in `table.py`: scores shrink less, and reading costs the same. A code of eight bits is two of
    four: the upper one alone stands for the middle of its sixteen cells.
    """

    bits: int  # 2, 4 or 8
    group: int = 0  # dimensions that share a scale; 0: all
    clip: float = 0.0  # the outermost values in root mean squares; 0: by the range

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"affine codes have 2, 4 or 8 bits, not {self.bits}")

    @property
    def name(self) -> str:
        group = f"g{self.group}" if self.group else ""
        return f"a{self.bits}{group}" + (f"c{self.clip:g}" if self.clip else "")

    def groups(self, n: int) -> int:
        group = self.group or n
        if n % group or group % 8:
            raise ValueError(f"{n} numbers do not make groups of {group}")
        return n // group

    def sizes(self, n: int) -> Sizes:
        numbers = 2 * self.groups(n)
        if self.bits == 8:
            return Sizes(n // 2, n // 2, numbers)
        return Sizes(packed_bytes(self.bits, n), 0, numbers)

    def encode(self, x: Tensor) -> Code:
        n = x.shape[-1]
        parts = x.unflatten(-1, (self.groups(n), -1))
        count = 1 << self.bits
        if self.clip:
            rms = root(squares(parts) * (1.0 / parts.shape[-1]))
            scale, zero = rms * (2 * self.clip / (count - 1)), rms * -self.clip
        else:
            low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
            scale = (high - low) * (1.0 / count)
            zero = low + scale * 0.5
        # Codes are chosen by the numbers that will be read.
        scale = scale.clamp(max=LARGEST).half()
        zero = zero.clamp(-LARGEST, LARGEST).half()
        inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0)
        codes = ((parts - zero.float()) * inverse).round().clamp(0, count - 1)
        flat = codes.to(torch.uint8).flatten(-2)
        if self.bits < 8:
            scale, zero = _stretched(parts, codes, scale.float(), zero.float())
        numbers = torch.cat([scale, zero], dim=-1).flatten(-2)
        if self.bits == 8:
            return Code(pack(flat >> 4, 4), pack(flat & 15, 4), numbers)
        return Code(pack(flat, self.bits), flat[..., :0], numbers)

    def decode(self, code: Code, coarse: bool = False) -> Tensor:
        if self.bits == 8:
            codes = unpack(code.high, 4).float() * 16.0
            codes += 7.5 if coarse else unpack(code.low, 4).float()
        else:
            codes = unpack(code.high, self.bits).float()
        numbers = code.numbers.float().unflatten(-1, (-1, 2))
        parts = codes.unflatten(-1, (numbers.shape[-2], -1))
        return (parts * numbers[..., :1] + numbers[..., 1:]).flatten(-2)


def _stretched(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """x, codes: [..., groups, group]; scale, zero: [..., groups, 1] fp32 -> the numbers to store,
    fp16."""
    length = squares(codes * scale + zero)
    by = root(squares(x) / length).clamp(max=MOST_GROWTH)
    by = torch.where(length > 0, by, 1.0)
    return (scale * by).clamp(max=LARGEST).half(), (zero * by).clamp(-LARGEST, LARGEST).half()
