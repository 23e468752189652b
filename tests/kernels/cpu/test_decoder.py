"""NativeDecoder gives what its layers give through NativeOps, one by one."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.cpu.decoder import DecoderLayer, NativeDecoder
from kernels.cpu.ops import NativeOps
from kernels.kv.format import dense_rows
from kernels.kv.presets import layer_formats
from kernels.kv.windows import Windows
from kernels.ops import AttentionBatch
from tests.kernels.batches import Rows

from .batches import Shape, make_batch

HIDDEN, INNER, VOCABULARY = 96, 160, 50
EPS = 1e-5


class Model:
    """Random weights; every other layer sees a window."""

    def __init__(self, native: NativeOps, dtype: torch.dtype, shape: Shape, bias: bool) -> None:
        g = torch.Generator().manual_seed(3)
        width = shape.heads * shape.head_dim

        def weight(*size: int) -> Tensor:
            return (torch.randn(*size, generator=g) * size[-1] ** -0.5).to(dtype)

        angles = torch.randn(2048, shape.head_dim // 2, generator=g)
        attention = shape.layer(
            torch.stack([angles.cos(), angles.sin()], dim=1),
            None if bias else 1 + weight(2, shape.head_dim),
        )
        self.layers = [
            DecoderLayer(
                input_norm=1 + weight(HIDDEN),
                qkv=native.linear(
                    weight(width + 2 * shape.kv_heads * shape.head_dim, HIDDEN),
                    weight(width + 2 * shape.kv_heads * shape.head_dim) if bias else None,
                ),
                attention=replace(attention, window=window),
                output=native.linear(weight(HIDDEN, width)),
                mlp_norm=1 + weight(HIDDEN),
                gate_up=native.linear(weight(2 * INNER, HIDDEN)),
                down=native.linear(weight(HIDDEN, INNER).bfloat16().to(dtype)),  # kept in bf16
            )
            for window in (None, 40, None)
        ]
        self.embedding, self.norm = weight(VOCABULARY, HIDDEN), 1 + weight(HIDDEN)
        self.native = native

    def decoder(self) -> NativeDecoder:
        return self.native.decoder(self.embedding, self.layers, self.norm, EPS)

    def one_by_one(self, ids: Tensor, batch: AttentionBatch, kv: list[Tensor]) -> Tensor:
        ops = self.native
        x, residual = torch.zeros(len(ids), HIDDEN).to(self.embedding), self.embedding[ids]
        for layer, pages in zip(self.layers, kv, strict=True):
            x, residual = ops.add_rms_norm(x, residual, layer.input_norm, EPS)
            q = ops.rope_append(layer.qkv(x), layer.attention, pages, batch)
            x = layer.output(ops.attend(q, pages, layer.attention, batch).flatten(1))
            x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, EPS)
            x = layer.down(ops.silu_mul(layer.gate_up(x)))
        return ops.add_rms_norm(x, residual, self.norm, EPS)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [False, True], ids=["qwen3", "qwen2"])
def test_a_step_equals_its_operators(
    native: NativeOps, dtype: torch.dtype, bias: bool, threads: None
) -> None:
    g = torch.Generator().manual_seed(4)
    shape = Shape(heads=4, kv_heads=2, head_dim=32)
    model = Model(native, dtype, shape, bias)
    decoder = model.decoder()
    for rows in ([(0, 1)], [(5, 1), (70, 1), (0, 37)], [(1300, 2)], [(0, 300)]):
        batch, pages = make_batch(rows, shape.page_size, g)
        ids = torch.randint(0, VOCABULARY, (len(batch.positions),), generator=g)
        kv = [torch.randn(pages, 2, 2, 16, 32, generator=g).to(dtype) for _ in model.layers]
        found_kv, expected_kv = [k.clone() for k in kv], [k.clone() for k in kv]
        torch.set_num_threads(1)
        expected = model.one_by_one(ids, batch, expected_kv)
        assert expected.isfinite().all()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = decoder.forward(ids, batch, found_kv)
            assert torch.equal(found, expected), (rows, count)
            assert torch.equal(torch.stack(found_kv), torch.stack(expected_kv))
            for read in (batch.query_starts[1:].long() - 1, torch.arange(0)):
                some = decoder.forward(ids, batch, found_kv, read)
                assert torch.equal(some, expected[read])


def test_threads_that_lose_their_core_do_not_hang_or_change_a_step(
    native: NativeOps, threads: None
) -> None:
    """More threads than cores: some are late for most stages and asleep in others."""
    g = torch.Generator().manual_seed(4)
    shape = Shape(heads=4, kv_heads=2, head_dim=32)
    model = Model(native, torch.float32, shape, bias=False)
    decoder = model.decoder()
    batch, pages = make_batch([(5, 1), (70, 1), (0, 37)], shape.page_size, g)
    ids = torch.randint(0, VOCABULARY, (len(batch.positions),), generator=g)
    kv = [torch.randn(pages, 2, 2, 16, 32, generator=g) for _ in model.layers]
    torch.set_num_threads(1)
    expected = decoder.forward(ids, batch, kv)
    torch.set_num_threads(2 * (os.cpu_count() or 1) + 1)
    for _ in range(100):
        assert torch.equal(decoder.forward(ids, batch, kv), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layers_with_and_without_dense_windows(
    native: NativeOps, dtype: torch.dtype, threads: None
) -> None:
    """Of different blocks, too, so that queries are divided differently from layer to layer."""
    g = torch.Generator().manual_seed(4)
    shape = Shape(heads=4, kv_heads=2, head_dim=32)
    model = Model(native, dtype, shape, bias=False)
    formats = [
        layer_formats("k4v2h", 1, 2, 16, 32, 0, sink=sink, window=block)[0]
        for sink, block in ((20, 32), (0, 16), (0, 0))
    ]
    assert formats[0].windows == Windows(20, 32)
    model.layers = [
        replace(layer, attention=replace(layer.attention, kv=form))
        for layer, form in zip(model.layers, formats, strict=True)
    ]
    decoder = model.decoder()
    rows = Rows.shuffled([130, 700], 16, g)
    pools = []
    for form in formats:
        behind = dense_rows(form, rows.num_pages, 2, 16, 32, dtype)
        size = (rows.num_pages + behind, *form.page_shape(2, 16, 32))
        pools.append([torch.zeros(size, dtype=torch.uint8) for _ in range(2)])
    found_kv, expected_kv = ([pair[i] for pair in pools] for i in range(2))
    for spans in (
        [(0, 0, 37), (1, 0, 650)],
        [(1, 650, 651), (0, 37, 120)],
        [(0, 120, 130), (1, 651, 660)],  # over the ends of blocks
    ):
        batch = rows.step(spans)
        ids = torch.randint(0, VOCABULARY, (len(batch.positions),), generator=g)
        expected = model.one_by_one(ids, batch, expected_kv)
        assert expected.isfinite().all()
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(decoder.forward(ids, batch, found_kv), expected)
            for found, other in zip(found_kv, expected_kv, strict=True):
                assert torch.equal(found, other)
    with pytest.raises(ValueError, match="where its dense copies lie"):
        decoder.forward(ids, replace(batch, copies=None), found_kv)


def test_wrong_parts_are_refused(native: NativeOps) -> None:
    shape = Shape(heads=4, kv_heads=2, head_dim=32)
    model = Model(native, torch.float32, shape, bias=False)
    batch, pages = make_batch([(0, 1)], 16, torch.Generator())
    ids = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="KV pool"):
        model.decoder().forward(ids, batch, [torch.zeros(pages, 2, 2, 16, 16)] * 3)
    with pytest.raises(ValueError, match="KV pool"):
        model.decoder().forward(ids, batch, [torch.zeros(pages, 2, 2, 16, 32).bfloat16()] * 3)
    kv = [torch.zeros(pages, 2, 2, 16, 32)] * 3
    with pytest.raises(ValueError, match="read must be"):
        model.decoder().forward(ids, batch, kv, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="all fp32 or all bf16"):
        native.decoder(model.embedding.bfloat16(), model.layers, model.norm, EPS)
    other = replace(model.layers[1].attention, num_heads=2)
    model.layers[1] = replace(model.layers[1], attention=other)
    with pytest.raises(ValueError, match="same attention heads"):
        model.decoder()
