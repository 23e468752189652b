"""`TorchOps`: the decoder's operations in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import activation, norm
from kernels.attention.paged import attend_group, plan_queries
from kernels.attention.tiles import QueryGroup
from kernels.ops import AttentionBatch, AttentionLayer
from kernels.rope import rotate


class TorchOps:
    """Eager torch. Needs no compiler; the measure of the native and Triton forms.

    In float32 a token's result is bitwise independent of the rest of the step, as far as torch's
    matrix products are (see `kernels.attention.paged`). One thread uses it at a time.
    """

    name = "torch"

    def __init__(self) -> None:
        # The grouping of queries is the same in all layers of a step, so it is kept.
        self._planned: AttentionBatch | None = None
        self._groups: tuple[QueryGroup, ...] = ()

    def captures(self, layer: AttentionLayer) -> bool:
        return False  # ragged steps read lengths on the host

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return norm.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return activation.silu_mul(gate_up)

    def rope_append(
        self, qkv: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> Tensor:
        """See `kernels.ops.Ops.rope_append`."""
        heads, kv_heads = layer.num_heads, layer.num_kv_heads
        split = qkv.view(qkv.shape[0], heads + 2 * kv_heads, layer.head_dim)
        v = split[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = norm.rms_norm(split[:, :heads], layer.q_norm, layer.norm_eps)
            k = norm.rms_norm(split[:, heads : heads + kv_heads], layer.k_norm, layer.norm_eps)
            qk = torch.cat([q, k], dim=1)
        else:
            qk = split[:, : heads + kv_heads]
        if layer.cos_sin is not None:
            qk = rotate(qk, layer.cos_sin[batch.positions])
        self.append(qk[:, heads:], v, layer, kv, batch)
        return qk[:, :heads]

    def append(
        self, k: Tensor, v: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> None:
        """See `kernels.ops.Ops.append`."""
        layer.kv.append(k, v, kv, batch.kv_slots, batch.copies)

    def attend(self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch) -> Tensor:
        """See `kernels.ops.Ops.attend`."""
        if self._planned is not batch:
            self._groups, self._planned = plan_queries(batch), batch
        q = layer.kv.turn(q)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for group in self._groups:
            if group.tokens is None:
                blocks = q.view(*group.positions.shape, *q.shape[1:])
                return layer.kv.turn_back(attend_group(blocks, kv, layer, group).reshape(q.shape))
            found = attend_group(q[group.tokens], kv, layer, group)
            out[group.tokens[group.valid]] = found[group.valid]
        return layer.kv.turn_back(out)
