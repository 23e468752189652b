"""Products of fp8 by fp8: weights with a scale a row, activations quantised row by row on the way.

Through `torch._scaled_mm`, which runs on the matrix units of sm_89 and later, and slowly on a CPU,
where the tests compare it. Not run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear.formats import Fp8Format, QuantizedWeight

MULTIPLE = 16  # inputs and outputs that the library's kernels take


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [rows, in] -> codes of e4m3, and each row's scale, [rows, 1] fp32."""
    quantized = Fp8Format(None).quantize(x)
    return quantized.planes[0], quantized.scales


def scaled_product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """See `kernels.linear.quantized.Product`. x: bf16; weight: fp8, a scale a row."""
    codes, scales = quantize_rows(x)
    found: Tensor = torch._scaled_mm(
        codes,
        weight.planes[0].t(),
        scale_a=scales,
        scale_b=weight.scales.float().t(),
        out_dtype=x.dtype,
    )
    return found


def takes(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Whether `scaled_product` multiplies activations of `dtype` by such a weight on its device,
    found by trying on a few of its outputs."""
    shapes = weight.inputs % MULTIPLE == 0 and weight.outputs % MULTIPLE == 0
    if weight.form != Fp8Format(None) or dtype != torch.bfloat16 or not shapes:
        return False
    few = weight.rows(0, MULTIPLE)
    x = torch.ones(1, weight.inputs, dtype=dtype, device=few.scales.device)
    try:
        return bool(scaled_product(x, few).isfinite().all())
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False
