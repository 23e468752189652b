"""`CoarseOps`: any operators, with layers whose pages are read by fewer bits."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kernels.ops import AttentionBatch, AttentionLayer, Ops


class CoarseOps:
    """Writes what the others write, but for dense copies, and reads half of it (QuantSpec, arXiv
    2502.10424)."""

    def __init__(self, ops: Ops) -> None:
        self.name = f"{ops.name}, coarse"
        self._ops = ops
        self._layers: dict[int, tuple[AttentionLayer, AttentionLayer]] = {}  # by id, both kept

    def captures(self, layer: AttentionLayer) -> bool:
        return self._ops.captures(self._coarse(layer))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._ops.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return self._ops.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._ops.silu_mul(gate_up)

    def rope_append(
        self, qkv: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> Tensor:
        return self._ops.rope_append(qkv, self._coarse(layer), kv, batch)

    def append(
        self, k: Tensor, v: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> None:
        self._ops.append(k, v, self._coarse(layer), kv, batch)

    def attend(self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch) -> Tensor:
        return self._ops.attend(q, kv, self._coarse(layer), batch)

    def _coarse(self, layer: AttentionLayer) -> AttentionLayer:
        known = self._layers.get(id(layer))
        if known is None:
            known = self._layers[id(layer)] = (layer, replace(layer, kv=layer.kv.coarse()))
        return known[1]
