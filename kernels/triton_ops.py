"""`TritonOps`: the decoder's operations as Triton kernels.

Not run on hardware yet: the kernels compile for sm_90 and are tested under Triton's interpreter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor

from kernels import activation_triton, norm_triton, rope_triton
from kernels.attention import dense_triton, packed_triton
from kernels.attention.split import merge
from kernels.kv import append_triton, seal_triton
from kernels.kv.format import Dense, KVFormat
from kernels.kv.paged import Paged
from kernels.kv.rotation import Rotation
from kernels.kv.rotation_triton import turn
from kernels.kv.sealed import Sealed
from kernels.kv.triton_launch import are_floats
from kernels.ops import AttentionBatch, AttentionLayer
from kernels.torch_ops import TorchOps

SHORT_QUERY = 32  # tokens of a row: the last one and its drafts, not a prompt's chunk


class DenseAttention(Protocol):
    """Attention over dense pages, as `Ops.attend`."""

    name: str
    capturable: bool  # whether a CUDA graph may capture it, for steps of short rows

    def attend(
        self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch
    ) -> Tensor: ...


class TritonAttention:
    """Dense pages by our kernel."""

    name = "triton"
    capturable = True

    def attend(self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch) -> Tensor:
        return dense_triton.attend(q, kv, layer, batch)


class DividedAttention:
    """Steps of short rows, that is decoding and verification, by our kernel, which needs no length
    on the host; steps with a chunk of a prompt by another, which may."""

    capturable = True

    def __init__(self, of_chunks: DenseAttention) -> None:
        self.name = f"{of_chunks.name} for prompts"
        self._short, self._long = TritonAttention(), of_chunks

    def attend(self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch) -> Tensor:
        chosen = self._short if batch.max_query <= SHORT_QUERY else self._long
        return chosen.attend(q, kv, layer, batch)


class Pages(Protocol):
    """How the pages of one layer are written and read: that part of `Ops`, which see."""

    def rope_append(
        self, qkv: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> Tensor: ...

    def append(
        self, k: Tensor, v: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> None: ...

    def attend(
        self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch
    ) -> Tensor: ...


class DensePages:
    """Keys and values as they are; appending is part of the rotary embedding's kernel."""

    def __init__(self, attention: DenseAttention) -> None:
        self._attention = attention

    def rope_append(
        self, qkv: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> Tensor:
        return rope_triton.rope_append(qkv, layer, kv, batch)

    def append(
        self, k: Tensor, v: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> None:
        layer.kv.append(k, v, kv, batch.kv_slots)

    def attend(self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch) -> Tensor:
        return self._attention.attend(q, kv, layer, batch)


class _CodedPages(ABC):
    """Pages of codes: queries are turned before attention, and what that makes is turned back."""

    def __init__(self, rotation: Rotation | None) -> None:
        self._rotation = rotation

    def rope_append(
        self, qkv: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> Tensor:
        q, k, v = rope_triton.rope(qkv, layer, batch)
        self.append(k, v, layer, kv, batch)
        return q

    @abstractmethod
    def append(
        self, k: Tensor, v: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> None: ...

    def attend(self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch) -> Tensor:
        found = self._attend(turn(self._rotation, q, back=False), kv, layer, batch)
        return turn(self._rotation, found, back=True)

    @abstractmethod
    def _attend(
        self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch
    ) -> Tensor: ...


class PackedPages(_CodedPages):
    """Of affine codes, which attention multiplies as they lie."""

    def __init__(self, paged: Paged) -> None:
        """Raises ValueError for codecs and heads that the kernels do not take."""
        append_triton.append_launch(paged)
        super().__init__(paged.rotation)
        self._paged = paged

    def append(
        self, k: Tensor, v: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> None:
        append_triton.append(self._paged, k, v, kv, batch.kv_slots, batch.copies)

    def _attend(
        self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch
    ) -> Tensor:
        return merge(packed_triton.attend(q, kv, layer, batch), q.dtype)


class FloatPages(PackedPages):
    """Of eight-bit floats, which attention reads as it reads dense numbers."""

    def _attend(
        self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch
    ) -> Tensor:
        return dense_triton.attend_floats(q, kv, layer, batch)


class SealedPages(_CodedPages):
    """Encoded when they are full, keys channel by channel."""

    def __init__(self, sealed: Sealed) -> None:
        """Raises ValueError for pages and heads that the kernels do not take."""
        seal_triton.seal_launch(sealed)
        super().__init__(sealed.rotation)
        self._sealed = sealed

    def append(
        self, k: Tensor, v: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> None:
        assert batch.copies is not None
        seal_triton.append(self._sealed, k, v, kv, batch.kv_slots, batch.copies)

    def _attend(
        self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch
    ) -> Tensor:
        return merge(packed_triton.attend(q, kv, layer, batch), q.dtype)


class TritonOps:
    """Everything by Triton kernels, but for layers whose pages or heads these do not take: their
    pages are written and read by torch. One thread uses it at a time.

    Nothing synchronises with the host, apart from the pages that torch reads and what `attention`
    does. In 16 bits norms, gates and rotations are rounded as in `TorchOps`.
    """

    def __init__(self, attention: DenseAttention | None = None) -> None:
        """attention: over dense pages; default: our kernel."""
        self.name = "triton" if attention is None else f"triton, {attention.name}"
        attention = attention or TritonAttention()
        self._capturable = attention.capturable
        self._dense = DensePages(attention)
        self._torch = TorchOps()
        # By a format's id, with the format itself, so that no id is used twice; and head size.
        self._pages: dict[tuple[int, int], tuple[KVFormat, Pages]] = {}

    def captures(self, layer: AttentionLayer) -> bool:
        """Not what torch reads, which looks at lengths on the host."""
        return self._capturable and self.pages(layer) is not self._torch

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm_triton.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return norm_triton.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return activation_triton.silu_mul(gate_up)

    def rope_append(
        self, qkv: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> Tensor:
        """See `kernels.ops.Ops.rope_append`."""
        return self.pages(layer).rope_append(qkv, layer, kv, batch)

    def append(
        self, k: Tensor, v: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> None:
        """See `kernels.ops.Ops.append`."""
        self.pages(layer).append(k, v, layer, kv, batch)

    def attend(self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch) -> Tensor:
        """See `kernels.ops.Ops.attend`."""
        return self.pages(layer).attend(q, kv, layer, batch)

    def pages(self, layer: AttentionLayer) -> Pages:
        """Who writes and reads this layer's pages: chosen when its format is first met."""
        key = (id(layer.kv), layer.head_dim)
        known = self._pages.get(key)
        if known is None:
            known = self._pages[key] = (layer.kv, self._choose(layer))
        return known[1]

    def _choose(self, layer: AttentionLayer) -> Pages:
        # Formats derived from these may do anything else, so they are torch's.
        if type(layer.kv) is Dense and dense_triton.takes(layer):
            return self._dense
        try:
            if type(layer.kv) is Sealed:
                return SealedPages(layer.kv)
            if type(layer.kv) is Paged and not are_floats(layer.kv):
                return PackedPages(layer.kv)
            if (
                type(layer.kv) is Paged
                and dense_triton.takes(layer)
                and dense_triton.reads_floats()
            ):
                return FloatPages(layer.kv)
        except ValueError:
            pass
        return self._torch
