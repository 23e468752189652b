"""SwiGLU's gate (Shazeer 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """The specification: g / (1 + exp(-g)) · u in fp32, rounded once.

    gate_up: [..., 2 * intermediate], gates first -> [..., intermediate].
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [..., 2 * intermediate] -> [..., intermediate].

    In fp32 it is spelled out: torch's vectorised silu rounds the tail of a loop differently from
    its body, so that a value would depend on where it stands; exp, add and divide do not.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if gate_up.dtype == torch.float32:
        return gate / torch.exp(-gate).add_(1) * up
    return F.silu(gate).mul_(up)
