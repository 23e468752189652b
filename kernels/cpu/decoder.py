"""A whole decoder step in one native call; see `native/decoder.cpp`."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, addressof, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kernels.cpu.library import Library, check_batch, type_of
from kernels.cpu.linear import NativeLinear
from kernels.cpu.packed import copies_address, native_format
from kernels.kv.windows import DensePages
from kernels.ops import AttentionBatch, AttentionLayer


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The weights of one pre-norm layer: attention, then SwiGLU."""

    input_norm: Tensor  # [hidden]
    qkv: NativeLinear
    attention: AttentionLayer
    output: NativeLinear
    mlp_norm: Tensor  # [hidden]
    gate_up: NativeLinear
    down: NativeLinear


class NativeDecoder:
    """Runs a dense Llama-family decoder's layers without returning to Python between them.

    Gives what the same layers give through `NativeOps`, bit for bit, and shares their packed
    weights. One thread uses it at a time.
    """

    def __init__(
        self,
        library: Library,
        embedding: Tensor,
        layers: Sequence[DecoderLayer],
        norm: Tensor,
        eps: float,
    ) -> None:
        """embedding: [vocabulary, hidden]; norm: [hidden], before the head.

        Raises ValueError for mixed dtypes and for layers of different head shapes.
        """
        first = layers[0].attention
        heads = (first.num_heads, first.num_kv_heads, first.head_dim)
        for layer in layers:
            shape = layer.attention
            if (shape.num_heads, shape.num_kv_heads, shape.head_dim) != heads:
                raise ValueError("all layers of a native decoder have the same attention heads")
        formats = [native_format(layer.attention.kv) for layer in layers]
        self._kept = formats  # the structures point into these, and into the weights
        self._library, self._all = library, (embedding, tuple(layers), norm, eps)
        self._hidden, self._dtype = embedding.shape[1], embedding.dtype
        self._run, self._size = library.decoder_step, library.workspace_bytes
        self._layers = (_Layer * len(layers))(*(_layer(layer, embedding) for layer in layers))
        self._pages = [layer.attention.kv for layer in layers]
        for structure, packed in zip(self._layers, formats, strict=True):
            structure.format = None if packed is None else addressof(packed)
        self.structure = _Model(
            layers=self._layers,
            num_layers=len(layers),
            hidden=self._hidden,
            heads=heads[0],
            kv_heads=heads[1],
            head_dim=heads[2],
            embedding=embedding.data_ptr(),
            norm=norm.data_ptr(),
            eps=eps,
            type=type_of(embedding, norm),
        )
        self._kv: Sequence[Tensor] = ()
        self._dense_pages = 0
        self._workspace = torch.empty(0, dtype=torch.uint8)

    def coarse(self) -> NativeDecoder:
        """The same decoder, reading the same pages by fewer bits (`KVFormat.coarse`)."""
        embedding, layers, norm, eps = self._all
        halves = [
            replace(layer, attention=replace(layer.attention, kv=layer.attention.kv.coarse()))
            for layer in layers
        ]
        return NativeDecoder(self._library, embedding, halves, norm, eps)

    def forward(
        self,
        ids: Tensor,
        batch: AttentionBatch,
        kv: Sequence[Tensor],
        read: Tensor | None = None,
    ) -> Tensor:
        """One ragged step.

        ids: [tokens] int64; kv: per layer its pool, [pages, *page_shape], appended to in place.
        Returns hidden states after the final norm, [tokens, hidden]; with `read`, [reads] int64
        different token rows, theirs alone, [reads, hidden], which saves most of the last layer's
        work in a prompt chunk.
        """
        step, out = self.step(ids, batch, kv, read)
        self._run(byref(self.structure), byref(step), torch.get_num_threads())
        return out

    def step(
        self,
        ids: Tensor,
        batch: AttentionBatch,
        kv: Sequence[Tensor],
        read: Tensor | None = None,
        least: int = 0,
    ) -> tuple[Step, Tensor]:
        """The arguments of a step, and where its result will be. They point into the tensors. The
        workspace is large enough for `least` tokens, too."""
        check_batch(batch)
        if read is not None and (read.dtype != torch.int64 or read.shape[0] > ids.shape[0]):
            raise ValueError("read must be int64 token rows, each at most once")
        copies = batch.copies
        dense_pages = 0 if copies is None else copies.count
        if kv is not self._kv or dense_pages != self._dense_pages:
            self._attach(kv, copies)
            self._dense_pages = dense_pages
        tokens = ids.shape[0]
        size = self._size(byref(self.structure), max(tokens, least))
        if self._workspace.shape[0] < size:
            self._workspace = torch.empty(size, dtype=torch.uint8)
        wanted = tokens if read is None else read.shape[0]
        out = torch.empty((wanted, self._hidden), dtype=self._dtype)
        step = Step(
            ids.data_ptr(),
            batch.positions.data_ptr(),
            batch.kv_slots.data_ptr(),
            batch.query_starts.data_ptr(),
            batch.page_table.data_ptr(),
            tokens,
            batch.query_starts.shape[0] - 1,
            batch.page_table.stride(0),
            self._workspace.data_ptr(),
            out.data_ptr(),
            None if read is None else read.data_ptr(),
            -1 if read is None else wanted,
            None if copies is None else copies.slots.data_ptr(),
            None if copies is None else copies.table.data_ptr(),
            0 if copies is None else copies.table.stride(0),
        )
        return step, out

    def _attach(self, kv: Sequence[Tensor], copies: DensePages | None) -> None:
        """Takes the layers' pools, which are the same ones in every step, as are their dense
        pages."""
        model = self.structure
        page_size = self._pages[0].page_size(kv[0])
        for layer, pages, pool in zip(self._layers, self._pages, kv, strict=True):
            shape = pages.page_shape(model.kv_heads, page_size, model.head_dim)
            dtype = pages.pool_dtype(self._dtype)
            if pool.shape[1:] != shape or pool.dtype != dtype or not pool.is_contiguous():
                raise ValueError(f"KV pool of shape {tuple(pool.shape)} and {pool.dtype}")
            layer.pool = pool.data_ptr()
            layer.copies = copies_address(pages, pool, copies, self._dtype)
        model.page_size = page_size
        self._kv = kv


class Projection(Structure):
    """A linear layer."""

    _fields_: ClassVar = [
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("columns", c_int64),
        ("inner", c_int64),
        ("type", c_int32),
    ]


class _Layer(Structure):
    _fields_: ClassVar = [
        ("input_norm", c_void_p),
        ("qkv", Projection),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("output", Projection),
        ("mlp_norm", c_void_p),
        ("gate_up", Projection),
        ("down", Projection),
        ("cos_sin", c_void_p),
        ("rotary_half", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("qk_eps", c_float),
        ("pool", c_void_p),
        ("copies", c_void_p),
        ("format", c_void_p),
    ]


class _Model(Structure):
    _fields_: ClassVar = [
        ("layers", POINTER(_Layer)),
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("page_size", c_int64),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("eps", c_float),
        ("type", c_int32),
    ]


class Step(Structure):
    """One call of a decoder."""

    _fields_: ClassVar = [
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_starts", c_void_p),
        ("page_table", c_void_p),
        ("tokens", c_int64),
        ("rows", c_int64),
        ("table_stride", c_int64),
        ("workspace", c_void_p),
        ("out", c_void_p),
        ("read", c_void_p),
        ("reads", c_int64),
        ("copy_slots", c_void_p),
        ("copies", c_void_p),
        ("copies_stride", c_int64),
    ]


def _layer(layer: DecoderLayer, embedding: Tensor) -> _Layer:
    shape = layer.attention
    norms = [n for n in (shape.q_norm, shape.k_norm) if n is not None]
    type_of(embedding, layer.input_norm, layer.mlp_norm, *norms)
    for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
        if linear.dtype != embedding.dtype:
            raise ValueError(f"a linear layer of {linear.dtype} in a decoder of {embedding.dtype}")
    cos_sin = shape.cos_sin
    if cos_sin is not None and (cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous()):
        raise ValueError("cos_sin must be a contiguous fp32 tensor")
    return _Layer(
        input_norm=layer.input_norm.data_ptr(),
        qkv=projection(layer.qkv),
        q_norm=None if shape.q_norm is None else shape.q_norm.data_ptr(),
        k_norm=None if shape.k_norm is None else shape.k_norm.data_ptr(),
        output=projection(layer.output),
        mlp_norm=layer.mlp_norm.data_ptr(),
        gate_up=projection(layer.gate_up),
        down=projection(layer.down),
        cos_sin=None if cos_sin is None else cos_sin.data_ptr(),
        rotary_half=0 if cos_sin is None else cos_sin.shape[2],
        window=shape.window or 0,
        scale=shape.scale,
        qk_eps=shape.norm_eps,
    )


def projection(linear: NativeLinear) -> Projection:
    """Points into the layer's tensors."""
    return Projection(
        packed=linear.packed.data_ptr(),
        bias=None if linear.bias is None else linear.bias.data_ptr(),
        columns=linear.out_features,
        inner=linear.in_features,
        type=linear.weight_type,
    )
