"""The sampler in native code: `kernels/cpu/native/draw.h`, token for token the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import Library
from kernels.sampling.reference import NoiseKey, Truncation


class NativeSampling:
    """`usable`, `argmax_rows` and `draw` on the CPU. Runs on `torch.get_num_threads()` threads.

    A row depends on that row alone, and equals what the other forms give: one may be exchanged for
    another at any time. Raises ValueError for layouts the kernel does not take.
    """

    def __init__(self, library: Library) -> None:
        self._sample = library.sample
        self._usable = library.usable

    def usable(self, logits: Tensor) -> Tensor:
        """As `reference.usable`."""
        found = _empty(logits, torch.bool)
        self._usable(logits.data_ptr(), found.data_ptr(), *logits.shape, _threads())
        return found

    def argmax_rows(self, logits: Tensor) -> Tensor:
        """As `pruned.argmax_rows`; a row with NaN or without a finite maximum gives 0."""
        tokens = _empty(logits)
        self._sample(logits.data_ptr(), tokens.data_ptr(), *logits.shape, *(None,) * 7, _threads())
        return tokens

    def draw(
        self, logits: Tensor, temperature: Tensor, key: NoiseKey, limits: Truncation | None = None
    ) -> Tensor:
        """As `reference.draw`."""
        tokens = _empty(logits)
        rows = [
            _array(temperature, torch.float32, logits),
            _array(key.seed, torch.int64, logits),
            _array(key.choice, torch.int64, logits),
            _array(key.position, torch.int64, logits),
        ]
        if limits is not None:
            rows += [
                _array(limits.log_min_p, torch.float32, logits),
                _array(limits.top_k, torch.int64, logits),
                _array(limits.top_p, torch.float64, logits),
            ]
        addresses = [row.data_ptr() for row in rows] + [None] * (7 - len(rows))
        self._sample(logits.data_ptr(), tokens.data_ptr(), *logits.shape, *addresses, _threads())
        return tokens


def _empty(logits: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    if logits.dtype != torch.float32 or logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError("logits must be a contiguous fp32 matrix")
    return torch.empty(len(logits), dtype=dtype)


def _array(values: Tensor, dtype: torch.dtype, logits: Tensor) -> Tensor:
    if values.dtype != dtype or values.shape != logits.shape[:1]:
        raise ValueError(f"expected one {dtype} a row")
    return values.contiguous()


def _threads() -> int:
    return torch.get_num_threads()
