"""Packed pages in native code against the torch form, for this machine and for others."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.attention.paged import attend_reference
from kernels.cpu.build import BuildError, build, find_toolchain, load
from kernels.cpu.ops import NativeOps
from kernels.cpu.packed import native_format
from kernels.kv.codec import Affine
from kernels.kv.format import dense_rows
from kernels.kv.paged import Paged
from kernels.kv.presets import PRESETS, layer_formats
from kernels.kv.windows import Windows
from kernels.ops import AttentionLayer
from kernels.torch_ops import TorchOps
from tests.kernels.batches import Rows, demote

from .batches import Shape, make_batch, only

NAMES = [name for name, preset in PRESETS.items() if isinstance(preset.keys(), Affine)]
SHAPES = [
    Shape(8, 2, 64, 16),
    Shape(4, 4, 128, 8),
    Shape(6, 2, 32, 16, window=40),
    Shape(2, 1, 16, 4),
    Shape(4, 2, 96, 16),
]


@pytest.fixture(
    scope="module", params=["this machine", "AVX2", "no vectors"], ids=lambda name: name
)
def ops(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeOps:
    flags = {"this machine": (), "AVX2": ("-march=haswell",), "no vectors": ("-march=x86-64",)}
    try:
        toolchain = find_toolchain()
        mine = tuple(flag for flag in toolchain.flags if not flag.startswith("-m"))
        wanted = flags[request.param]
        if wanted:
            toolchain = replace(toolchain, flags=(*wanted, *mine))
        return load(build(tmp_path_factory.mktemp("packed"), toolchain))
    except BuildError as error:
        pytest.skip(str(error).splitlines()[0])


def layer_of(
    shape: Shape, name: str, mean: bool = False, groups: int = 0, halves: bool = False
) -> AttentionLayer:
    preset = PRESETS[name]
    keys, values = preset.keys(), preset.values()
    assert isinstance(keys, Affine)
    assert isinstance(values, Affine)
    key_mean = None
    if mean:
        g = torch.Generator().manual_seed(5)
        key_mean = torch.randn(shape.kv_heads, shape.head_dim, generator=g) * 3
    form = Paged(
        shape.kv_heads,
        shape.page_size,
        shape.head_dim,
        replace(keys, group=groups),
        replace(values, group=groups),
        rotated=preset.rotated,
        key_mean=key_mean,
        halves=halves,
    )
    return replace(shape.layer(), kv=form)


def written(
    ops: NativeOps | TorchOps,
    layer: AttentionLayer,
    spans: list[tuple[int, int]],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The pool with a history of every row, and the queries of the last tokens."""
    g = torch.Generator().manual_seed(3)
    assert isinstance(layer.kv, Paged)
    page_size = layer.kv.layout.page_size
    whole = [(0, before + tokens) for before, tokens in spans]
    history, pages = make_batch(whole, page_size, torch.Generator().manual_seed(1))
    count = len(history.positions)
    k, v = torch.randn(2, count, layer.num_kv_heads, layer.head_dim, generator=g).to(dtype)
    kv = torch.zeros(pages, layer.kv.layout.bytes, dtype=torch.uint8)
    ops.append(k + 2.0, v, layer, kv, history)
    q = torch.randn(sum(n for _, n in spans), layer.num_heads, layer.head_dim, generator=g)
    return kv, q.to(dtype)


@pytest.mark.parametrize("mean", [False, True], ids=["", "mean"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bytes_and_the_same_attention(ops: NativeOps, name: str, mean: bool) -> None:
    rng = random.Random(name)
    for shape in SHAPES:
        if name == "int4h64" and shape.head_dim % 64:
            continue
        layer = layer_of(shape, name, mean, 64 if name == "int4h64" else 0)
        spans = [(rng.randrange(0, 90), rng.choice([1, 1, 3, 20])) for _ in range(4)]
        kv, q = written(ops, layer, spans, torch.float32)
        expected, _ = written(TorchOps(), layer, spans, torch.float32)
        assert torch.equal(kv, expected)
        batch, _ = make_batch(spans, shape.page_size, torch.Generator().manual_seed(1))
        found = ops.attend(q, kv, layer, batch)
        torch.testing.assert_close(
            found, attend_reference(q, kv, layer, batch), rtol=2e-5, atol=2e-5
        )
        torch.testing.assert_close(
            TorchOps().attend(q, kv, layer, batch), found, rtol=2e-5, atol=2e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["int8n", "int4h64", "k4v2h"])
def test_dense_windows(ops: NativeOps, name: str, dtype: torch.dtype) -> None:
    """The same bytes behind the pages, too; rows that begin and end in different blocks."""
    layer = layer_of(Shape(4, 2, 128, 16), name, True, 64 if name == "int4h64" else 0)
    assert isinstance(layer.kv, Paged)
    layer.kv.windows = Windows(sink=40, block=64)
    g = torch.Generator().manual_seed(2)
    spans = [(0, 0, 33), (1, 126, 130), (2, 600, 601), (3, 55, 150)]
    rows = Rows.shuffled([end for _, _, end in spans], 16, g)
    written = rows.step([(row, 0, end) for row, _, end in spans])
    k, v = torch.randn(2, len(written.positions), 2, 128, generator=g).to(dtype)
    behind = dense_rows(layer.kv, rows.num_pages, 2, 16, 128, dtype)
    kv = torch.zeros(rows.num_pages + behind, layer.kv.layout.bytes, dtype=torch.uint8)
    expected = kv.clone()
    ops.append(k + 2.0, v, layer, kv, written)
    TorchOps().append(k + 2.0, v, layer, expected, written)
    assert torch.equal(kv, expected)
    batch = rows.step(spans)
    q = torch.randn(len(batch.positions), 4, 128, generator=g).to(dtype)
    within = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        ops.attend(q, kv, layer, batch).float(),
        attend_reference(q, kv, layer, batch).float(),
        rtol=within,
        atol=within,
    )
    with pytest.raises(ValueError, match="where its dense copies lie"):
        ops.attend(q, kv, layer, replace(batch, copies=None))


@pytest.mark.parametrize("name", ["int8n", "int4h", "k4v2h"])
def test_bf16_and_coarse_readings(ops: NativeOps, name: str) -> None:
    shape = Shape(8, 2, 128, 16)
    spans = [(700, 5), (40, 1), (0, 33)]
    batch, _ = make_batch(spans, shape.page_size, torch.Generator().manual_seed(1))
    layer = layer_of(shape, name)
    kv, q = written(ops, layer, spans, torch.bfloat16)
    assert isinstance(layer.kv, Paged)
    half = replace(layer, kv=layer.kv.coarse())
    coarse = attend_reference(q.float(), kv, half, batch)
    found = ops.attend(q, kv, half, batch)
    torch.testing.assert_close(found.float(), coarse, rtol=2e-2, atol=2e-2)
    fine = attend_reference(q.float(), kv, layer, batch)
    torch.testing.assert_close(ops.attend(q, kv, layer, batch).float(), fine, rtol=2e-2, atol=2e-2)
    assert torch.equal(coarse, fine) == (name != "int8n")


@pytest.mark.parametrize("coarse", [False, True], ids=["", "coarse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pages_of_which_some_are_halves(ops: NativeOps, dtype: torch.dtype, coarse: bool) -> None:
    rng = random.Random(4)
    within = 2e-5 if dtype == torch.float32 else 2e-2
    for shape in SHAPES:
        layer = layer_of(shape, "int8n", halves=True)
        spans = [(rng.randrange(0, 90), rng.choice([1, 1, 3, 20])) for _ in range(4)]
        kv, q = written(ops, layer, spans, dtype)
        assert torch.equal(kv, written(TorchOps(), layer, spans, dtype)[0])
        batch, _ = make_batch(spans, shape.page_size, torch.Generator().manual_seed(1))
        for share in (0.3, 1.0):
            some, table = demote(kv, batch.page_table, share, rng)
            mixed = replace(batch, page_table=table)
            form = layer.kv.coarse() if coarse else layer.kv
            expected = attend_reference(q.float(), some, replace(layer, kv=form), mixed)
            found = ops.attend(q, some, replace(layer, kv=form), mixed)
            torch.testing.assert_close(found.float(), expected, rtol=within, atol=within)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_row_depends_on_itself_alone(ops: NativeOps, dtype: torch.dtype, threads: None) -> None:
    shape = Shape(8, 2, 64, 16)
    layer = layer_of(shape, "int4h")
    spans = [(600, 1), (30, 40), (90, 3)]
    batch, _ = make_batch(spans, shape.page_size, torch.Generator().manual_seed(1))
    kv, q = written(ops, layer, spans, dtype)
    torch.set_num_threads(2)
    whole = ops.attend(q, kv, layer, batch)
    torch.set_num_threads(1)
    assert torch.equal(whole, ops.attend(q, kv, layer, batch))
    at = 0
    for row, (_, count) in enumerate(spans):
        alone = ops.attend(q[at : at + count], kv, layer, only(batch, row, 0, count))
        assert torch.equal(whole[at : at + count], alone)
        at += count


def test_large_small_and_equal_numbers(ops: NativeOps) -> None:
    shape = Shape(2, 2, 64, 8)
    layer = layer_of(shape, "int8n")
    batch, pages = make_batch([(0, 4)], 8, torch.Generator().manual_seed(1))
    assert isinstance(layer.kv, Paged)
    k = torch.randn(4, 2, 64, generator=torch.Generator().manual_seed(2))
    k *= torch.tensor([1e-30, 1e-4, 3e4, 0.0])[:, None, None]
    found = torch.zeros(pages, layer.kv.layout.bytes, dtype=torch.uint8)
    expected = found.clone()
    ops.append(k, k, layer, found, batch)
    TorchOps().append(k, k, layer, expected, batch)
    assert torch.equal(found, expected)
    assert ops.attend(k, found, layer, batch).isfinite().all()


def test_what_native_code_does_not_read_is_refused() -> None:
    assert native_format(layer_formats("auto", 1, 2, 16, 64)[0]) is None
    with pytest.raises(ValueError, match="codes of l4"):
        native_format(layer_formats("turbo4", 1, 2, 16, 64)[0])
    with pytest.raises(ValueError, match="groups of 8"):
        native_format(Paged(2, 16, 64, Affine(4, group=8), Affine(4, group=8), rotated=True))


def test_the_pool_has_to_fit(native: NativeOps, tmp_path: Path) -> None:
    layer = layer_of(Shape(2, 2, 64, 8), "int4h")
    batch, pages = make_batch([(0, 4)], 8, torch.Generator().manual_seed(1))
    assert isinstance(layer.kv, Paged)
    k = torch.zeros(4, 2, 64)
    for pool in (
        torch.zeros(pages, layer.kv.layout.bytes + 2, dtype=torch.uint8),
        torch.zeros(pages, layer.kv.layout.bytes),
        torch.zeros(pages, 2, 2, 8, 64),
    ):
        with pytest.raises(ValueError, match="KV pool"):
            native.append(k, k, layer, pool, batch)
