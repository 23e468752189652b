"""Codecs that decode by a table: `LloydMax` for single numbers, `Octopus` for triplets, `Float8`.

The first two are made for rotated vectors, whose numbers are nearly independent and nearly normal.
Both store one 16-bit float for a vector: its norm over that of the table's entries, so that what is
decoded has the vector's own norm, which halves the shrinkage of scores at two and three bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.kv.codec import LARGEST, Code, Sizes
from kernels.kv.pack import pack, packed_bytes, unpack

Numbers = NDArray[np.floating]

SMALLEST_NORM = 1e-18  # below it squares vanish in 32-bit floats: such vectors count as zero
LARGEST_E4M3 = 448.0
SAMPLE = 200_000  # triplets that Octopus fits its tables to
SAMPLE_SEED = 1  # part of the format, as the tables are


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [..., n] fp32 -> x / |x| * sqrt(n) and |x| [..., 1]; zeros stay zeros."""
    x = x.contiguous()  # sums are in the same order wherever a vector lies
    norm = x.square().sum(-1, keepdim=True).sqrt()
    return x * (math.sqrt(x.shape[-1]) / norm.clamp(min=SMALLEST_NORM)), norm


def _stored_norm(norm: Tensor, entries: Tensor) -> Tensor:
    """The number that makes entries [..., n] of a table as long as the vector was, [..., 1] fp16.

    No entry is zero, so nothing is divided by zero."""
    length = entries.square().sum(-1, keepdim=True).sqrt()
    return (norm / length).clamp(max=LARGEST).half()


def _whole_bytes(n: int) -> None:
    if n <= 0 or n % 8:
        raise ValueError(f"codes of {n} numbers do not fill bytes: a multiple of 8 is needed")


# Lloyd-Max


def _integrals(t: Numbers, n: int) -> tuple[Numbers, Numbers, Numbers]:
    """Of the density w(t) = (1 - t^2)^((n - 3) / 2) of one number of a unit vector (TurboQuant,
    arXiv 2504.19874, lemma 1), not normalised: the integrals of w and t * w from 0 to t, and w.

    With t = sin(a) the first is that of cos(a)^(n - 2), which has a recurrence in steps of two.
    """
    cos = np.sqrt(1 - t * t)
    power = n - 2
    mass: Numbers = t if power % 2 else np.arcsin(t)
    for k in range(2 + power % 2, power + 1, 2):
        mass = (cos ** (k - 1) * t + (k - 1) * mass) / k
    return mass, (1 - cos ** (n - 1)) / (n - 1), cos ** (n - 3)


@lru_cache(maxsize=64)
def codebook(bits: int, n: int) -> tuple[float, ...]:
    """The 2**bits centroids of least squared error for a number of a unit vector, times sqrt(n).

    Lloyd's conditions: cells end halfway between centroids, centroids are the means of their cells.
    The density is log-concave, so one set of centroids fulfils them (Fleischer, 1964). A few of
    Lloyd's steps, then Newton's, whose matrix has three diagonals: a centroid depends on its
    neighbours only.
    """
    if n < 4:
        raise ValueError(f"no codebook for vectors of {n} numbers")
    levels = 1 << bits
    found: Numbers = np.linspace(-1, 1, 2 * levels + 1)[1::2] * min(1.0, 3 / math.sqrt(n))
    for step in range(100):
        ends = np.concatenate([[-1.0], (found[1:] + found[:-1]) / 2, [1.0]])
        mass, moment, density = _integrals(ends, n)
        inside = np.diff(mass)
        means = np.diff(moment) / inside
        # How much each mean moves with the upper and the lower end of its cell.
        upper = density[1:] * (ends[1:] - means) / inside
        lower = density[:-1] * (means - ends[:-1]) / inside
        moves = np.diag(upper + lower) + np.diag(upper[:-1], 1) + np.diag(lower[1:], -1)
        change: Numbers = means - found
        if step >= 20:
            change = np.linalg.solve(np.eye(levels) - moves / 2, change)
        found = found + change
        if np.abs(change).max() < 1e-13:
            found = (found - found[::-1]) / 2  # exactly symmetric
            return tuple(float(c) for c in found * math.sqrt(n))
    raise RuntimeError(f"no codebook found for {bits} bits and {n} numbers")


@lru_cache(maxsize=64)
def _levels(bits: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centroids [2**bits] and what lies halfway between them, fp32 on the device."""
    centroids = np.array(codebook(bits, n))
    between = (centroids[1:] + centroids[:-1]) / 2
    made = (torch.from_numpy(a).float().to(device) for a in (centroids, between))
    return next(made), next(made)


@dataclass(frozen=True, slots=True)
class LloydMax:
    """value = number * centroids[code]: TurboQuant's codec for the mean squared error (arXiv
    2504.19874, algorithm 1), without its residual bit. For rotated vectors."""

    bits: int  # 2, 3 or 4

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise ValueError(f"codes by centroids have 2, 3 or 4 bits, not {self.bits}")

    @property
    def name(self) -> str:
        return f"l{self.bits}"

    def sizes(self, n: int) -> Sizes:
        _whole_bytes(n)
        return Sizes(packed_bytes(self.bits, n), 0, 1)

    def encode(self, x: Tensor) -> Code:
        centroids, between = _levels(self.bits, x.shape[-1], x.device)
        unit, norm = _unit(x)
        codes = torch.bucketize(unit, between)
        packed = pack(codes.to(torch.uint8), self.bits)
        return Code(packed, packed[..., :0], _stored_norm(norm, centroids[codes]))

    def decode(self, code: Code, coarse: bool = False) -> Tensor:
        codes = unpack(code.high, self.bits).long()
        centroids, _ = _levels(self.bits, codes.shape[-1], codes.device)
        return centroids[codes] * code.numbers.float()


# Eight-bit floats


@dataclass(frozen=True, slots=True)
class Float8:
    """value = an eight-bit float of four exponent and three mantissa bits; no numbers.

    Too large values become the largest one, where torch would make them no number at all. What lies
    outside its range is brought there by a scale of the head: see `HeadScales`."""

    @property
    def name(self) -> str:
        return "e4m3"

    def sizes(self, n: int) -> Sizes:
        return Sizes(n, 0, 0)

    def encode(self, x: Tensor) -> Code:
        held = x.clamp(-LARGEST_E4M3, LARGEST_E4M3)
        codes = held.to(torch.float8_e4m3fn).view(torch.uint8)
        return Code(codes, codes[..., :0], x.new_empty((*x.shape[:-1], 0), dtype=torch.float16))

    def decode(self, code: Code, coarse: bool = False) -> Tensor:
        return code.high.view(torch.float8_e4m3fn).float()


# Triplets


def _fit(values: Numbers, levels: int) -> Numbers:
    """Lloyd-Max centroids [levels] of a sample of one number."""
    ordered = np.sort(values)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    found = ordered[(2 * np.arange(levels) + 1) * len(ordered) // (2 * levels)]
    for _ in range(1000):
        between = np.searchsorted(ordered, (found[1:] + found[:-1]) / 2)
        ends = np.concatenate([[0], between, [len(ordered)]])
        means = np.diff(sums[ends]) / np.diff(ends)
        if np.array_equal(means, found):
            break
        found = means
    return found


def _normal(rows: int, columns: int) -> Numbers:
    """[rows, columns] normal numbers, by Box and Muller from raw bits: numpy promises that those
    stay the same in later versions, and of nothing else that it draws."""
    raw = np.random.PCG64(SAMPLE_SEED).random_raw((2, rows, columns))
    first, second = ((raw >> np.uint64(11)) + 0.5) * 2.0**-53
    return np.sqrt(-2 * np.log(first)) * np.cos(2 * math.pi * second)


@lru_cache(maxsize=1)
def _directions() -> Numbers:
    """[16, 3] unit vectors with positive first and second numbers, by pairs of octahedral levels.

    The octahedron |x| + |y| + |z| = 1 is unfolded into a square: its upper half is the inner
    diamond, its lower half is folded outwards (OCTOPUS, arXiv 2605.21226, section 3). By symmetry
    all signs of both coordinates have the same levels.
    """
    sample = _normal(SAMPLE, 3)
    point = np.abs(sample) / np.abs(sample).sum(-1, keepdims=True)
    square = np.where(sample[:, 2:] < 0, 1 - point[:, 1::-1], point[:, :2])
    levels = _fit(square.ravel(), 4)
    first, second = (a.ravel() for a in np.meshgrid(levels, levels, indexing="ij"))
    z = 1 - first - second
    x, y = np.where(z < 0, 1 - second, first), np.where(z < 0, 1 - first, second)
    found = np.stack([x, y, z], axis=-1)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


@lru_cache(maxsize=16)
def _radii(n: int) -> Numbers:
    """[4] lengths along the best direction of triplets of vectors with norm sqrt(n).

    Fitted to the lengths along the direction chosen, since that is what is rounded, not to the
    triplets' own.
    """
    vectors = _normal(3 * SAMPLE // n, n)
    vectors *= math.sqrt(n) / np.linalg.norm(vectors, axis=-1, keepdims=True)
    sample = vectors[:, : n // 3 * 3].reshape(-1, 3)
    sample[:, :2] = np.abs(sample[:, :2])
    return _fit((sample @ _directions().T).max(-1), 4)


def triplets(n: int) -> Numbers:
    """[256, 3]: what each byte stands for in a vector with norm sqrt(n).

    From the lowest bit: the first coordinate's level (2 bits) and sign, the second's, the radius
    (2 bits)."""
    byte = np.arange(256)
    signs = np.stack([1 - (byte >> 1 & 2), 1 - (byte >> 4 & 2), np.ones_like(byte)], axis=-1)
    direction = _directions()[4 * (byte & 3) + (byte >> 3 & 3)]
    return direction * signs * _radii(n)[byte >> 6, None]


@lru_cache(maxsize=16)
def _octopus(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Directions [3, 16], what lies halfway between radii [3], triplets [256, 3], fp32."""
    radii = _radii(n)
    arrays = (_directions().T.copy(), (radii[1:] + radii[:-1]) / 2, triplets(n))
    made = (torch.from_numpy(a).float().to(device) for a in arrays)
    return next(made), next(made), next(made)


@dataclass(frozen=True, slots=True)
class Octopus:
    """A byte for three numbers: an octahedral direction and a length (arXiv 2605.21226, with the
    bits that fill a byte instead of its own split). For rotated vectors.

    The nearest of all 256 entries is chosen: |t - r d|^2 = |t|^2 - 2 r (t d) + r^2 is least, for
    any radius r, in the direction d of the largest t d; then r is the radius nearest to it. The
    entries are symmetric in the first two numbers, so sixteen directions need trying.
    """

    @property
    def name(self) -> str:
        return "o8"

    def sizes(self, n: int) -> Sizes:
        _whole_bytes(n)  # also what lets `decode` know n
        return Sizes(-(-n // 3), 0, 1)

    def encode(self, x: Tensor) -> Code:
        n = x.shape[-1]
        directions, between, table = _octopus(n, x.device)
        unit, norm = _unit(x)
        parts = torch.nn.functional.pad(unit, (0, -n % 3)).unflatten(-1, (-1, 3))
        sizes = parts.abs()
        # Not a matrix product: its rounding may depend on how many vectors there are.
        along = sizes[..., :1] * directions[0] + sizes[..., 1:2] * directions[1]
        along += parts[..., 2:] * directions[2]
        best, direction = along.max(-1)
        codes = torch.div(direction, 4, rounding_mode="floor") | (direction % 4) << 3
        codes |= (parts[..., 0] < 0).long() << 2 | (parts[..., 1] < 0).long() << 5
        codes |= torch.bucketize(best, between) << 6
        high = codes.to(torch.uint8)
        entries = table[codes].flatten(-2)[..., :n]
        return Code(high, high[..., :0], _stored_norm(norm, entries))

    def decode(self, code: Code, coarse: bool = False) -> Tensor:
        n = 3 * code.high.shape[-1] // 8 * 8
        _, _, table = _octopus(n, code.high.device)
        return table[code.high.long()].flatten(-2)[..., :n] * code.numbers.float()
