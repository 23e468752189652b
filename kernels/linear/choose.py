"""Which way a quantised weight is multiplied by, found out once when its layer is made."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.linear import scaled
from kernels.linear.formats import QuantizedWeight
from kernels.linear.quantized import Product, QuantizedLinear, reference_product

if TYPE_CHECKING:
    from types import ModuleType


def quantized_linear(
    weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
) -> QuantizedLinear:
    """The layer for activations of `dtype`, on the device of the weight."""
    return QuantizedLinear(weight, bias, choose_product(weight, dtype))


def choose_product(weight: QuantizedWeight, dtype: torch.dtype) -> Product:
    """On a GPU `torch._scaled_mm` where it takes the weight, else the Triton kernel where that
    does; the plain torch form everywhere else."""
    if weight.scales.device.type == "cuda":
        if scaled.takes(weight, dtype):
            return scaled.scaled_product
        triton = _triton()
        if triton is not None and triton.takes(weight):
            product: Product = triton.product
            return product
    return reference_product


@cache
def _triton() -> ModuleType | None:
    try:
        from kernels.linear import quantized_triton
    except ImportError:
        return None
    return quantized_triton
