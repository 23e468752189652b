"""RMSNorm (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification: x / sqrt(mean(x²) + eps) · weight over the last axis.

    x: [..., hidden] of any float dtype; weight: [hidden]. Computed in fp32 and rounded once.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Torch's own RMSNorm; a row's result does not depend on the other rows."""
    return torch.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`residual += x` in place; returns (rms_norm(residual), residual)."""
    residual.add_(x)
    return rms_norm(residual, weight, eps), residual
