"""`Ops` on the CPU in native code: see `native/` for the kernels and `build.py` for their build."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof

import torch
from torch import Tensor

from kernels.cpu.chain import NativeChain
from kernels.cpu.decoder import DecoderLayer, NativeDecoder
from kernels.cpu.library import Library, check_batch, type_of
from kernels.cpu.linear import NativeLinear
from kernels.cpu.packed import NativeFormat, copies_address, native_format
from kernels.kv.format import KVFormat
from kernels.ops import AttentionBatch, AttentionLayer
from kernels.sampling.native import NativeSampling

_LARGEST_HEAD = 1024  # elements; a head is rotated in a buffer of that size


class NativeOps:
    """The decoder's operators for bf16 and fp32 tensors on the CPU.

    Every result row depends on that row alone: not on the others in the batch, on how a prompt is
    cut into chunks, or on the number of threads, bit for bit. Runs on torch's OpenMP threads, as
    many as `torch.get_num_threads()`; the GIL is released meanwhile. Raises ValueError for types
    and layouts the kernels do not take.
    """

    name = "native-cpu"

    def __init__(self, library: Library) -> None:
        self._library = library
        self._formats: dict[KVFormat, NativeFormat | None] = {}

    def captures(self, layer: AttentionLayer) -> bool:
        return False

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> NativeLinear:
        """The native layer for a weight [out, in] and bias [out]; see `NativeLinear`."""
        return NativeLinear(self._library, weight, bias)

    def decoder(
        self, embedding: Tensor, layers: Sequence[DecoderLayer], norm: Tensor, eps: float
    ) -> NativeDecoder:
        """All layers in one call; see `NativeDecoder`."""
        return NativeDecoder(self._library, embedding, layers, norm, eps)

    def chain(self, decoder: NativeDecoder, head: NativeLinear) -> NativeChain:
        """Drafts in one call; see `NativeChain`."""
        return NativeChain(self._library, decoder, head)

    def sampling(self) -> NativeSampling:
        """The sampler; see `NativeSampling`."""
        return NativeSampling(self._library)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        x, hidden = x.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        self._library.rms_norm(
            type_of(x, weight),
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // hidden,
            hidden,
            eps,
            torch.get_num_threads(),
        )
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`. Writes the sum into `residual` where that is contiguous."""
        x, residual, hidden = x.contiguous(), residual.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        self._library.add_rms_norm(
            type_of(x, residual, weight),
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // hidden,
            hidden,
            eps,
            torch.get_num_threads(),
        )
        return out, residual

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""
        gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
        out = gate_up.new_empty((*gate_up.shape[:-1], width))
        self._library.silu_mul(
            type_of(gate_up),
            gate_up.data_ptr(),
            out.data_ptr(),
            gate_up.numel() // (2 * width),
            width,
            torch.get_num_threads(),
        )
        return out

    def rope_append(
        self, qkv: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> Tensor:
        """See `Ops.rope_append`."""
        check_batch(batch)
        qkv = qkv.contiguous()
        tokens, dim = qkv.shape[0], layer.head_dim
        if not 0 < dim <= _LARGEST_HEAD:
            raise ValueError(f"head_dim {dim} is not supported by {self.name}")
        cos_sin = layer.cos_sin
        if cos_sin is not None and (cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous()):
            raise ValueError("cos_sin must be a contiguous fp32 tensor")
        q = qkv.new_empty((tokens, layer.num_heads, dim))
        norms = [norm for norm in (layer.q_norm, layer.k_norm) if norm is not None]
        self._library.rope_append(
            type_of(qkv, *norms),
            qkv.data_ptr(),
            q.data_ptr(),
            *self._pool(kv, layer, qkv.dtype, batch),
            batch.positions.data_ptr(),
            batch.kv_slots.data_ptr(),
            None if batch.copies is None else batch.copies.slots.data_ptr(),
            tokens,
            layer.num_heads,
            None if cos_sin is None else cos_sin.data_ptr(),
            0 if cos_sin is None else cos_sin.shape[2],
            None if layer.q_norm is None else layer.q_norm.data_ptr(),
            None if layer.k_norm is None else layer.k_norm.data_ptr(),
            layer.norm_eps,
            torch.get_num_threads(),
        )
        return q

    def append(
        self, k: Tensor, v: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> None:
        """See `Ops.append`. Heads and dimensions of k and v must be contiguous, tokens need not."""
        tokens, _, dim = k.shape
        if k.stride()[1:] != (dim, 1) or v.stride()[1:] != (dim, 1):
            k, v = k.contiguous(), v.contiguous()
        self._library.append(
            type_of(k, v),
            k.data_ptr(),
            v.data_ptr(),
            k.stride(0),
            v.stride(0),
            *self._pool(kv, layer, k.dtype, batch),
            batch.kv_slots.data_ptr(),
            None if batch.copies is None else batch.copies.slots.data_ptr(),
            tokens,
            torch.get_num_threads(),
        )

    def attend(self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch) -> Tensor:
        """See `Ops.attend`."""
        check_batch(batch)
        q = q.contiguous()
        if layer.head_dim * q.element_size() % 4 or layer.num_heads % layer.num_kv_heads:
            raise ValueError(f"attention shape {layer} is not supported by {self.name}")
        out = torch.empty_like(q)
        self._library.attend(
            type_of(q),
            q.data_ptr(),
            out.data_ptr(),
            *self._pool(kv, layer, q.dtype, batch),
            batch.positions.data_ptr(),
            batch.query_starts.data_ptr(),
            batch.page_table.data_ptr(),
            batch.query_starts.shape[0] - 1,
            batch.page_table.stride(0),
            None if batch.copies is None else batch.copies.table.data_ptr(),
            0 if batch.copies is None else batch.copies.table.stride(0),
            layer.num_heads,
            layer.scale,
            layer.window or 0,
            torch.get_num_threads(),
        )
        return out

    def _pool(
        self, kv: Tensor, layer: AttentionLayer, dtype: torch.dtype, batch: AttentionBatch
    ) -> tuple[int | None, int, int | None, int, int, int]:
        """Format, address, that of dense copies, KV heads, page size and head size of a layer's
        pool."""
        heads, dim = layer.num_kv_heads, layer.head_dim
        page_size = layer.kv.page_size(kv)
        shape, expected = layer.kv.page_shape(heads, page_size, dim), layer.kv.pool_dtype(dtype)
        if not kv.is_contiguous() or kv.shape[1:] != shape or kv.dtype != expected:
            raise ValueError(
                f"KV pool of shape {tuple(kv.shape)} and {kv.dtype} does not fit {heads} heads of "
                f"{dim} in {layer.kv.name} pages"
            )
        if layer.kv not in self._formats:
            self._formats[layer.kv] = native_format(layer.kv)
        packed = self._formats[layer.kv]
        address = None if packed is None else addressof(packed)
        copies = copies_address(layer.kv, kv, batch.copies, dtype)
        return address, kv.data_ptr(), copies, heads, page_size, dim
