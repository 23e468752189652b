"""SwiGLU's gate as a Triton kernel: `kernels.activation` on a GPU.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv.triton_launch import Launch

BLOCK = 1024  # numbers of a program


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `Ops.silu_mul`. gate_up: [..., 2 * intermediate] -> [..., intermediate]."""
    *shape, both = gate_up.shape
    size = both // 2
    out = torch.empty(*shape, size, dtype=gate_up.dtype, device=gate_up.device)
    rows = out.numel() // size
    if rows:
        launch = silu_launch()
        _silu_mul[(rows, triton.cdiv(size, BLOCK))](
            gate_up.contiguous(),
            out,
            size,
            **launch.constants,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    return out


def silu_launch() -> Launch:
    return Launch({"block": BLOCK}, warps=4, stages=1)


@triton.jit
def _silu_mul(
    gate_up: tl.tensor,  # [rows, 2 * size]
    out: tl.tensor,  # [rows, size], written
    size: tl.tensor,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * size + at, gated.to(out.dtype.element_ty), mask=inside)
