"""Host lists to device tensors without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(
    values: Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """values -> 1-D tensor on the device. On CUDA the copy is queued, from pinned memory."""
    return send(torch.tensor(values, dtype=dtype), device)


def send(host: Tensor, device: torch.device) -> Tensor:
    """As `upload`, of a tensor in host memory."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
