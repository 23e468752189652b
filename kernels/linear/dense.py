"""`DenseLinear`: the plain matrix product, and the parameters other linear layers are made from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLinear(nn.Module):
    """`x @ weight.T + bias` by torch's own product. weight: [out, in]; bias: [out] or None."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    @classmethod
    def empty(
        cls,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> DenseLinear:
        """Uninitialised, for a checkpoint to be copied into."""
        weight = torch.empty(outputs, inputs, dtype=dtype, device=device)
        return cls(
            nn.Parameter(weight, requires_grad=False),
            nn.Parameter(weight.new_empty(outputs), requires_grad=False) if bias else None,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        return F.linear(x, self.weight, self.bias)
