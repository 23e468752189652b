"""The blocks of a decoder layer. Projections that read the same input are stored fused.

`targets(prefix)` of a block names each tensor of a Hugging Face checkpoint that belongs to it and
the place it is copied to: a view of one of the block's parameters. `cuts(prefix, …)` says of which
of them only a part belongs there, when the model is divided among ranks. Loading knows nothing
else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.linear.dense import DenseLinear
from kernels.ops import AttentionBatch, AttentionLayer, Ops
from models.parallel import Collective, Cut, RowParallel, Shard, row_parallel
from models.spec import ModelSpec

Target = tuple[str, Tensor]


def weight(size: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised vector of norm weights."""
    return nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)


def linear_targets(
    prefix: str, layer: DenseLinear | RowParallel, parts: dict[str, int] | None = None
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


def output_cuts(
    prefix: str, layer: nn.Module, size: int, index: int, pieces: int
) -> Iterator[tuple[str, Cut]]:
    """Piece `index` of the outputs of a linear layer, `size` of them."""
    yield f"{prefix}.weight", Cut.piece(0, index, pieces, size)
    if layer.bias is not None:
        yield f"{prefix}.bias", Cut.piece(0, index, pieces, size)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, for Qwen3, normalised heads."""

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        cos_sin: Tensor,
        dtype: torch.dtype,
        device: torch.device,
        collective: Collective,
    ) -> None:
        """spec: of this rank's part; so are the heads below."""
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
        self.output = row_parallel(
            self._parts["q_proj"],
            spec.hidden_size,
            bias=spec.output_bias,
            dtype=dtype,
            device=device,
            collective=collective,
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

    def cuts(self, prefix: str, shard: Shard, whole: ModelSpec) -> Iterator[tuple[str, Cut]]:
        kv_piece = shard.kv_piece(whole.num_kv_heads)
        for part, size in self._parts.items():
            piece = (shard.rank, shard.size) if part == "q_proj" else kv_piece
            yield from output_cuts(f"{prefix}.{part}", self.qkv, size, *piece)
        inputs = self._parts["q_proj"]
        yield f"{prefix}.o_proj.weight", Cut.piece(1, shard.rank, shard.size, inputs)


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        collective: Collective,
    ) -> None:
        """intermediate: of this rank's part."""
        super().__init__()
        self._parts = {"gate_proj": intermediate, "up_proj": intermediate}
        self.gate_up = DenseLinear.empty(
            hidden, 2 * intermediate, bias=bias, dtype=dtype, device=device
        )
        self.down = row_parallel(
            intermediate, hidden, bias=bias, dtype=dtype, device=device, collective=collective
        )

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """x: [tokens, hidden] -> [tokens, hidden]."""
        return self.down(ops.silu_mul(self.gate_up(x)))

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from linear_targets(f"{prefix}.", self.gate_up, self._parts)
        yield from linear_targets(f"{prefix}.down_proj", self.down)

    def cuts(self, prefix: str, shard: Shard) -> Iterator[tuple[str, Cut]]:
        for part, size in self._parts.items():
            yield from output_cuts(f"{prefix}.{part}", self.gate_up, size, shard.rank, shard.size)
        inputs = self._parts["up_proj"]
        yield f"{prefix}.down_proj.weight", Cut.piece(1, shard.rank, shard.size, inputs)
