"""`Turned`: what formats store instead of keys and values, and how queries meet it.

Keys are less their mean, and keys and values rotated, where the format says so. Queries are turned
before they meet keys, and what attention sums up is turned back.
"""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor

from kernels.kv.rotation import SEED, Rotation


class Turned:
    """That part of a `KVFormat`, which see."""

    def __init__(self, head_dim: int, *, rotated: bool, key_mean: Tensor | None) -> None:
        """key_mean: [kv_heads, head_dim], subtracted from every key, which changes no softmax: all
        scores of a query fall by the same. Raises ValueError for heads that cannot be rotated."""
        self.head_dim = head_dim
        self.rotation = Rotation(head_dim) if rotated else None
        self.key_mean = None if key_mean is None else key_mean.float().contiguous()
        self._mean_on: dict[torch.device, Tensor] = {}

    @property
    def turning(self) -> str:
        """Of the format's name, what the bytes of a page depend on by this."""
        rotated = f"r{SEED}" if self.rotation else ""
        return rotated if self.key_mean is None else f"{rotated}m{_digest(self.key_mean)}"

    def turned(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [tokens, kv_heads, head_dim] -> what is stored of them, fp32."""
        k, v = k.float(), v.float()
        if self.key_mean is not None:
            k = k - self.mean_on(k.device)
        if self.rotation is not None:
            k, v = self.rotation.forth(k), self.rotation.forth(v)
        return k, v

    def mean_on(self, device: torch.device) -> Tensor:
        """The key mean there: copied once, for a copy from the host is waited for."""
        assert self.key_mean is not None
        if device not in self._mean_on:
            self._mean_on[device] = self.key_mean.to(device)
        return self._mean_on[device]

    def turn(self, q: Tensor) -> Tensor:
        return q if self.rotation is None else self.rotation.forth(q).to(q.dtype)

    def turn_back(self, out: Tensor) -> Tensor:
        return out if self.rotation is None else self.rotation.back(out).to(out.dtype)


def _digest(numbers: Tensor) -> str:
    return sha256(numbers.cpu().numpy().tobytes()).hexdigest()[:16]
