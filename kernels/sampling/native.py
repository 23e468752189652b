"""The sampler in native code: `kernels/cpu/native/draw.h`, token for token the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import Library
from kernels.sampling.accept import Drafts
from kernels.sampling.processors import penalize
from kernels.sampling.reference import Chosen, Draws, conclude


class NativeSampling:
    """`usable` and `choose`, on `torch.get_num_threads()` threads of a CPU; penalties are torch's.

    A row depends on that row alone, and equals what the other forms give: one may be exchanged for
    another at any time. Raises ValueError for layouts the kernel does not take.
    """

    penalize = staticmethod(penalize)

    def __init__(self, library: Library) -> None:
        self._sample = library.sample
        self._usable = library.usable

    def usable(self, logits: Tensor) -> Tensor:
        """As `reference.usable`."""
        found = _empty(logits, torch.bool)
        self._usable(logits.data_ptr(), found.data_ptr(), *logits.shape, _threads())
        return found

    def choose(
        self,
        logits: Tensor,
        draws: Draws | None = None,
        raw_usable: Tensor | None = None,
        drafts: Drafts | None = None,
    ) -> Chosen:
        """As `reference.choose`, in one pass over the logits."""
        tokens, usable = _empty(logits, torch.int64), _empty(logits, torch.bool)
        rows: list[Tensor] = []
        if draws is not None:
            rows = [
                _array(draws.temperature, torch.float32, logits),
                _array(draws.key.seed, torch.int64, logits),
                _array(draws.key.choice, torch.int64, logits),
                _array(draws.key.position, torch.int64, logits),
            ]
            if draws.limits is not None:
                rows += [
                    _array(draws.limits.log_min_p, torch.float32, logits),
                    _array(draws.limits.top_k, torch.int64, logits),
                    _array(draws.limits.top_p, torch.float64, logits),
                ]
        self._sample(
            *(tensor.data_ptr() for tensor in (logits, tokens, usable)),
            *logits.shape,
            *(row.data_ptr() for row in rows),
            *(None,) * (7 - len(rows)),
            _threads(),
        )
        return conclude(tokens, usable, raw_usable, drafts)


def _empty(logits: Tensor, dtype: torch.dtype) -> Tensor:
    if logits.dtype != torch.float32 or logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError("logits must be a contiguous fp32 matrix")
    return torch.empty(len(logits), dtype=dtype)


def _array(values: Tensor, dtype: torch.dtype, logits: Tensor) -> Tensor:
    if values.dtype != dtype or values.shape != logits.shape[:1]:
        raise ValueError(f"expected one {dtype} a row")
    return values.contiguous()


def _threads() -> int:
    return torch.get_num_threads()
