"""`Balance`: channels of keys and values that are made alike before they are stored.

A code of few bits spreads its error over all channels of a head, since they are rotated; so one
that is far larger than the others costs all of them. Scores do not change if a channel of keys is
divided by s and that of queries multiplied by it, nor the output if one of values is divided and
what the output projection takes from it multiplied. Errors of scores are, up to a factor, the sum
over channels of (s q)^2 times that of (k / s)^2, which is least at s = sqrt(|k| / |q|) by Cauchy
and Schwarz. SmoothQuant (arXiv 2211.10438, equation 4 with alpha 0.5) does so with activations and
weights.

Here every s is a power of two and goes into the weights, so in floating point nothing changes but
what is stored in few bits: dense pages give the same logits bit for bit, and it costs no time. The
two channels of a rotary pair share one, for then it does not matter which comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 8  # a factor of 256 either way; beyond it a channel is dead in all texts seen


@dataclass(frozen=True, slots=True, eq=False)
class Balance:
    """Exponents of the powers of two by which keys and values are divided: each
    [layers, kv_heads, head_dim] int64 on the CPU."""

    keys: Tensor
    values: Tensor

    @staticmethod
    def nothing(shape: Sequence[int]) -> Balance:
        """All channels stay as they are. `shape`: layers, KV heads, head size."""
        zeros = torch.zeros(*shape, dtype=torch.int64)
        return Balance(zeros, zeros)

    @property
    def changes(self) -> int:
        """How many channels do not stay as they are."""
        return int(self.keys.count_nonzero() + self.values.count_nonzero())

    def part(self, index: int, pieces: int) -> Balance:
        """Piece `index` of `pieces` of the KV heads."""
        return Balance(self.keys.chunk(pieces, 1)[index], self.values.chunk(pieces, 1)[index])


def exponents(stored: Tensor, read: Tensor) -> Tensor:
    """stored: mean squares of channels of keys or values; read: those of what they are multiplied
    by. Both [..., head_dim] -> log2 of s, int64, relative to the median channel's."""
    least = torch.finfo(torch.float64).tiny
    ratio = 0.25 * (stored.double().clamp(min=least) / read.double().clamp(min=least)).log2()
    relative = ratio - ratio.median(-1, keepdim=True).values
    return relative.round().clamp(-LARGEST, LARGEST).long()


def paired(squares: Tensor) -> Tensor:
    """[..., head_dim] -> the same, where both channels of a rotary pair have their sum."""
    low, high = squares.chunk(2, -1)
    return torch.cat([low + high, low + high], -1)
