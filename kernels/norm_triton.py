"""RMSNorm, with and without the residual's addition, as one Triton kernel: `kernels.norm` on a GPU.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv.triton_launch import Launch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `Ops.rms_norm`. x: [..., hidden]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x.contiguous(), x, weight, out, eps, added=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `Ops.add_rms_norm`: writes the sum into `residual`, which is contiguous."""
    out = torch.empty_like(residual)
    _launch(x.contiguous(), residual, weight, out, eps, added=True)
    return out, residual


def _launch(
    x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, *, added: bool
) -> None:
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    if rows == 0:
        return
    launch = norm_launch(hidden, added)
    _rms_norm[(rows,)](
        x,
        residual,
        weight,
        out,
        eps,
        **launch.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


def norm_launch(hidden: int, added: bool) -> Launch:
    width = triton.next_power_of_2(hidden)
    # Sixteen numbers a thread, as far as that goes.
    warps = min(max(width // (32 * 16), 1), 16)
    return Launch({"hidden": hidden, "width": width, "added": added}, warps, stages=1)


@triton.jit
def _rms_norm(
    x: tl.tensor,  # [rows, hidden]
    residual: tl.tensor,  # [rows, hidden], written if `added`
    weight: tl.tensor,  # [hidden]
    out: tl.tensor,  # [rows, hidden], written
    eps: tl.tensor,
    hidden: tl.constexpr,
    width: tl.constexpr,
    added: tl.constexpr,
) -> None:
    dim = tl.arange(0, width)
    inside = dim < hidden
    at = tl.program_id(0).to(tl.int64) * hidden + dim
    row = tl.load(x + at, mask=inside, other=0.0)
    if added:
        # Rounded before it is normalised, as it is kept.
        total = row.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        row = total.to(row.dtype)
        tl.store(residual + at, row, mask=inside)
    wide = row.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / hidden + eps)
    normed = wide * scale * tl.load(weight + dim, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)
