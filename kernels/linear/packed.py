"""`PackedLinear`: weights laid out once for the CPU's matrix units (oneDNN)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.linear.dense import DenseLinear

# Rows the layout is chosen for; oneDNN runs any other number on it too.
HINT_ROWS = 32


class PackedLinear(nn.Module):
    """As `DenseLinear` for inference on a CPU, faster for few rows.

    `F.linear` brings a 16-bit weight into blocked order on every call, which costs as much as the
    product itself when there are few rows. Here that is done once, and the original is not kept.
    """

    def __init__(self, dense: DenseLinear) -> None:
        super().__init__()
        self.bias = dense.bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(
            dense.weight.detach().contiguous(), HINT_ROWS
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] of the weight's dtype -> [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def packing_works(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this CPU run `PackedLinear` in `dtype`, found by trying."""
    if not torch.backends.mkldnn.is_available():
        return False
    weight = torch.linspace(-1, 1, 16 * 8).view(16, 8).to(dtype)
    x = torch.linspace(-2, 2, 3 * 8).view(3, 8).to(dtype)
    try:
        with torch.inference_mode():
            found = PackedLinear(DenseLinear(nn.Parameter(weight, requires_grad=False)))(x)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    expected = x.double() @ weight.double().T
    return bool(torch.allclose(found.double(), expected, rtol=2e-2, atol=2e-2))
