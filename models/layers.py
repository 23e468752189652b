"""The blocks of a decoder layer. Projections that read the same input are stored fused.

`targets(prefix)` of a block names each tensor of a Hugging Face checkpoint that belongs to it and
the place it is copied to: a view of one of the block's parameters. Loading knows nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.linear.dense import DenseLinear
from kernels.ops import AttentionBatch, AttentionLayer, Ops
from models.spec import ModelSpec

Target = tuple[str, Tensor]


def weight(size: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised vector of norm weights."""
    return nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)


def linear_targets(
    prefix: str, layer: DenseLinear, parts: dict[str, int] | None = None
) -> Iterator[Target]:
    """The checkpoint's tensors of a linear layer, `parts` (name -> outputs) of it when fused."""
    if parts is None:
        parts = {"": layer.weight.shape[0]}
    start = 0
    for part, size in parts.items():
        name = f"{prefix}{part}"
        yield f"{name}.weight", layer.weight[start : start + size]
        if layer.bias is not None:
            yield f"{name}.bias", layer.bias[start : start + size]
        start += size


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, for Qwen3, normalised heads."""

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        cos_sin: Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._parts = {
            "q_proj": spec.num_heads * spec.head_dim,
            "k_proj": spec.num_kv_heads * spec.head_dim,
            "v_proj": spec.num_kv_heads * spec.head_dim,
        }
        self.qkv = DenseLinear.empty(
            spec.hidden_size,
            sum(self._parts.values()),
            bias=spec.qkv_bias,
            dtype=dtype,
            device=device,
        )
        self.output = DenseLinear.empty(
            self._parts["q_proj"],
            spec.hidden_size,
            bias=spec.output_bias,
            dtype=dtype,
            device=device,
        )
        self.q_norm = weight(spec.head_dim, dtype, device) if spec.qk_norm else None
        self.k_norm = weight(spec.head_dim, dtype, device) if spec.qk_norm else None
        # Holds the parameters themselves, so it stays true as they are filled; the model is
        # built on its device and not moved afterwards.
        self.layer = AttentionLayer(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scale=spec.head_dim**-0.5,
            cos_sin=cos_sin,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            norm_eps=spec.norm_eps,
            window=spec.windows[index],
        )

    def forward(self, x: Tensor, batch: AttentionBatch, kv: Tensor, ops: Ops) -> Tensor:
        """x: [tokens, hidden] -> [tokens, hidden]; appends to `kv`."""
        q = ops.rope_append(self.qkv(x), self.layer, kv, batch)
        return self.output(ops.attend(q, kv, self.layer, batch).flatten(1))

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from linear_targets(f"{prefix}.", self.qkv, self._parts)
        yield from linear_targets(f"{prefix}.o_proj", self.output)
        if self.q_norm is not None and self.k_norm is not None:
            yield f"{prefix}.q_norm.weight", self.q_norm
            yield f"{prefix}.k_norm.weight", self.k_norm


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(
        self, hidden: int, intermediate: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self._parts = {"gate_proj": intermediate, "up_proj": intermediate}
        self.gate_up = DenseLinear.empty(
            hidden, 2 * intermediate, bias=bias, dtype=dtype, device=device
        )
        self.down = DenseLinear.empty(intermediate, hidden, bias=bias, dtype=dtype, device=device)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """x: [tokens, hidden] -> [tokens, hidden]."""
        return self.down(ops.silu_mul(self.gate_up(x)))

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from linear_targets(f"{prefix}.", self.gate_up, self._parts)
        yield from linear_targets(f"{prefix}.down_proj", self.down)
