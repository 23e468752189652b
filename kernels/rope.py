"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama and Qwen."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_reference(x: Tensor, cos_sin: Tensor) -> Tensor:
    """The specification: dimension i pairs with i + rotary_dim / 2; later ones pass through.

    x: [tokens, heads, head_dim]; cos_sin: [tokens, 2, rotary_dim / 2] fp32, the table's rows at
    the tokens' positions. Computed in fp32, x's dtype out.
    """
    cos, sin = cos_sin[:, None, 0], cos_sin[:, None, 1]
    half = cos.shape[-1]
    a, b, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """As `rotate_reference`, writing into one fresh tensor."""
    cos, sin = cos_sin[:, None, 0], cos_sin[:, None, 1]
    half = cos.shape[-1]
    wide = x.float()
    a, b = wide[..., :half], wide[..., half : 2 * half]
    out = torch.empty_like(x)
    # Every product and difference is rounded on its own (no fused multiply-add), so that a value
    # does not depend on its place in the vectorised loop.
    out[..., :half] = a * cos - b * sin
    out[..., half : 2 * half] = b * cos + a * sin
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
