"""The rotation of heads: random signs, then a Walsh-Hadamard transform.

It spreads what stands out in a few channels over all of them, so that one scale fits a whole
vector (QuaRot, arXiv 2404.00456; TurboQuant, 2504.19874). Scores do not change if queries are
rotated, too.
"""

from __future__ import annotations

import math
from functools import lru_cache
from random import Random

import torch
from torch import Tensor

SEED = 1  # of the signs; part of a format's name, for bytes depend on it
SMALLEST = 16  # blocks that are worth a rotation


def block_of(head_dim: int) -> int:
    """The largest power of two that divides it: such blocks are rotated, each by itself."""
    return head_dim & -head_dim


@lru_cache(maxsize=16)
def signs(head_dim: int, seed: int = SEED) -> Tensor:
    """[head_dim] fp32 on the CPU, each 1 or -1."""
    bits = Random(seed).getrandbits(head_dim)
    return torch.tensor([1.0 - 2.0 * (bits >> i & 1) for i in range(head_dim)])


def hadamard(x: Tensor, block: int) -> Tensor:
    """The orthonormal transform of each block of the last dimension: its own inverse. x: fp32.

    Butterflies in the order of the native kernel, so that both give the same bits."""
    shape = x.shape
    x = x.reshape(-1, block)
    half = 1
    while half < block:
        x = x.view(-1, block // (2 * half), 2, half)
        low, high = x[:, :, 0], x[:, :, 1]
        x = torch.stack([low + high, low - high], dim=2).view(-1, block)
        half *= 2
    return (x * (1.0 / math.sqrt(block))).view(shape)


class Rotation:
    """x -> H (signs * x), with the inverse signs * H x. In fp32."""

    def __init__(self, head_dim: int) -> None:
        """Raises ValueError if the head has no block to speak of."""
        self.block = block_of(head_dim)
        if self.block < SMALLEST:
            raise ValueError(f"a head of {head_dim} numbers has no power of two to rotate by")
        self.signs = signs(head_dim)
        self._on: dict[torch.device, Tensor] = {}

    def forth(self, x: Tensor) -> Tensor:
        return hadamard(x.float() * self._signs(x), self.block)

    def back(self, x: Tensor) -> Tensor:
        return hadamard(x.float(), self.block) * self._signs(x)

    def _signs(self, x: Tensor) -> Tensor:
        if x.device not in self._on:
            self._on[x.device] = self.signs.to(x.device)
        return self._on[x.device]
