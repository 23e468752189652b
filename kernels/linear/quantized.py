"""`QuantizedLinear`: a matrix product whose weight stays in few bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear.formats import QuantizedWeight

TILE = 1 << 22  # numbers of a weight that are dequantised at a time
# Outputs that a tile is a multiple of: see `InvariantLinear` for what that is good for.
MULTIPLE = 16


class Product(Protocol):
    """One way to multiply by a quantised weight, chosen when the layer is made."""

    def __call__(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        """x: [rows, in], in the order of the stored columns -> [rows, out] of x's dtype."""
        ...


def reference_product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """`x @ weight.T` tile by tile: at no time is the whole matrix there in x's dtype."""
    step = max(TILE // weight.inputs // MULTIPLE, 1) * MULTIPLE
    out = x.new_empty(x.shape[0], weight.outputs)
    for start in range(0, weight.outputs, step):
        part = weight.rows(start, start + step)
        out[:, start : start + step] = F.linear(x, part.form.values(part).to(x.dtype))
    return out


class QuantizedLinear(nn.Module):
    """As `DenseLinear`, for inference alone. Fused projections are one weight: see `formats.join`.

    The codes, scales and zeros are buffers, so that a model's memory is its parameters and buffers.
    A model is built on its device and not moved afterwards.
    """

    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, product: Product) -> None:
        """bias: [out] of the activations' dtype, or None."""
        super().__init__()
        self.weight = weight
        self._product = product
        for i, plane in enumerate(weight.planes):
            self.register_buffer(f"plane{i}", plane, persistent=False)
        self.register_buffer("scales", weight.scales, persistent=False)
        self.register_buffer("zeros", weight.zeros, persistent=False)
        self.register_buffer("order", weight.order, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        rows = x.reshape(-1, self.weight.inputs)
        if self.weight.order is not None:
            rows = rows[:, self.weight.order]
        out = self._product(rows, self.weight)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.weight.outputs)

    def extra_repr(self) -> str:
        return f"{self.weight.inputs} -> {self.weight.outputs}, {self.weight.form.name}"


class SplitLinear(nn.Module):
    """Projections of the same input that cannot be fused, because their formats differ."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        """parts: linear layers, whose outputs come one after another."""
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight of the model's is in few bits."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def parameter_count(model: nn.Module) -> int:
    """Numbers that the model computes with, in however many bits each is kept."""
    dense = sum(parameter.numel() for parameter in model.parameters())
    layers = (m.weight for m in model.modules() if isinstance(m, QuantizedLinear))
    return dense + sum(weight.inputs * weight.outputs for weight in layers)


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
