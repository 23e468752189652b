"""`Ops`: what a decoder step is made of, apart from its linear layers.

Shapes: `tokens` is the number of token rows in a ragged step (all rows' chunks and drafts laid end
to end), `rows` the number of sequences in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.kv.format import DENSE, KVFormat
from kernels.kv.windows import DensePages


@dataclass(frozen=True, slots=True)
class HostRows:
    """What the host knows exactly about a step's rows, in its own memory."""

    query_starts: Tensor  # [rows + 1] int32
    kv_lengths: Tensor  # [rows] int32


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where one ragged step's tokens stand and which pages they may see. Built once a step."""

    positions: Tensor  # [tokens] int64, absolute position of each token
    token_rows: Tensor  # [tokens] int64, row of each token
    query_starts: Tensor  # [rows + 1] int32, first token of each row; the last is `tokens`
    kv_lengths: Tensor  # [rows] int32, KV positions of the row once this step's are appended
    page_table: Tensor  # [rows, pages] int32, padded with the null page 0
    kv_slots: Tensor  # [tokens] int64, page * page_size + offset of each token's KV
    # Host-side bounds, so that no kernel has to read a length back from the device.
    max_query: int  # the longest row of this step, tokens
    max_kv: int  # an upper bound of kv_lengths
    copies: DensePages | None = None  # where windows of packed pages are dense
    # For attention that plans on the host (`kernels.flashinfer`); None: it reads lengths back.
    host: HostRows | None = None


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What is constant about one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    cos_sin: Tensor | None  # [positions, 2, rotary_dim / 2] fp32; None: no rotary embedding
    q_norm: Tensor | None = None  # [head_dim], Qwen3's per-head RMSNorm
    k_norm: Tensor | None = None  # [head_dim]
    norm_eps: float = 1e-6
    window: int | None = None  # sliding window: a token sees this many positions, itself included
    kv: KVFormat = DENSE  # how this layer's pages hold keys and values


class Ops(Protocol):
    """One implementation per device. Nothing here may synchronise with the host."""

    name: str

    def captures(self, layer: AttentionLayer) -> bool:
        """Whether a step can be recorded and repeated on other contents of the same tensors, as far
        as this layer's heads and pages go: what is launched follows from shapes and from the
        batch's host-side bounds alone, rows without tokens included, and what is derived from a
        batch is kept for that very object."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm (Zhang & Sennrich 2019). x: [..., hidden]; computed in fp32, x's dtype out."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`r = residual + x`; returns (rms_norm(r), r). May write `r` into `residual`."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up: [tokens, 2 * intermediate] -> silu(gate) * up: [tokens, intermediate]."""
        ...

    def rope_append(
        self, qkv: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> Tensor:
        """Per-head norm, rotary embedding and KV append in one go.

        qkv: [tokens, (heads + 2 * kv_heads) * head_dim]; kv: the layer's pool, [pages, *page_shape]
        of `layer.kv`, written in place at `batch.kv_slots`. Returns q: [tokens, heads, head_dim].
        """
        ...

    def append(
        self, k: Tensor, v: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> None:
        """Writes k, v: [tokens, kv_heads, head_dim] into `kv` at `batch.kv_slots`."""
        ...

    def attend(self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch) -> Tensor:
        """Causal attention of each token over its row's pages, its own position included.

        q: [tokens, heads, head_dim]; kv: the layer's pool. Softmax in fp32. Returns
        [tokens, heads, head_dim] in q's dtype.
        """
        ...
