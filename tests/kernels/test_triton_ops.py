"""`TritonOps` against the specifications and against whole models by `TorchOps`: on a GPU, or under
Triton's interpreter."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.activation import silu_mul_reference
from kernels.attention.paged import attend_reference
from kernels.kv.format import Dense, KVFormat
from kernels.kv.presets import layer_formats
from kernels.kv.rotation import Rotation
from kernels.norm import rms_norm_reference
from kernels.ops import AttentionBatch, AttentionLayer
from kernels.torch_ops import TorchOps
from models.loader import load_model
from tests.kernels.batches import Rows, moved
from tests.models.checkpoints import save
from worker.kv_pool import allocate_pool
from worker.runner import EagerRunner

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

from kernels.attention import dense_triton
from kernels.interpreter import mend
from kernels.kv.rotation_triton import turn
from kernels.triton_ops import DividedAttention, FloatPages, PackedPages, SealedPages, TritonOps

mend()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def on_device(batch: AttentionBatch) -> AttentionBatch:
    return moved(batch, DEVICE)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


class Draws:
    """Random tensors of one dtype, one after another."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(DEVICE, self.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (5, 320), (2, 3, 128)])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    draw = Draws(0, dtype)
    x, residual, weight = draw(*shape) * 3, draw(*shape), draw(shape[-1])
    close(TritonOps().rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    total = x + residual
    normed, carried = TritonOps().add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(carried, total)
    close(normed, rms_norm_reference(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [37, 1500])
def test_silu_mul(dtype: torch.dtype, size: int) -> None:
    x = Draws(2, dtype)(3, 2 * size) * 4
    x[0, 0], x[0, 1] = -120.0, 120.0
    close(TritonOps().silu_mul(x), silu_mul_reference(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("rotary", [None, 64, 16])
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_rope_append(dtype: torch.dtype, normed: bool, rotary: int | None, kind: str) -> None:
    """Against the torch form, which has a specification of its own."""
    draw = Draws(3, dtype)
    rows = Rows.shuffled([70, 20, 33], 16, draw.generator)
    batch = on_device(rows.step([(0, 66, 70), (1, 19, 20), (2, 0, 9)]))
    table = draw(80, 2, rotary // 2).float() if rotary else None
    norms = [draw(64) if normed else None for _ in range(2)]
    form: KVFormat = Dense()
    if kind == "packed":
        form = layer_formats("k8v4", 1, 3, 16, 64)[0]
    layer = AttentionLayer(6, 3, 64, 1.0, table, *norms, norm_eps=1e-6, kv=form)
    # A slice, so that tokens lie further apart than they are wide.
    qkv = draw(len(batch.positions), 13 * 64)[:, 64:]
    if kind == "dense":
        kv = draw(rows.num_pages, *form.page_shape(3, 16, 64))
    else:
        kv = torch.zeros(rows.num_pages, *form.page_shape(3, 16, 64), dtype=torch.uint8).to(DEVICE)
    expected_kv = kv.clone()
    expected = TorchOps().rope_append(qkv.contiguous(), layer, expected_kv, batch)
    found = TritonOps().rope_append(qkv, layer, kv, batch)
    close(found, expected)
    if kind == "dense":
        close(kv, expected_kv)
        return
    pages = batch.page_table.long()
    ours, theirs = (form.gather(pool, pages) for pool in (kv, expected_kv))
    for side, step in zip(range(2), (0.03, 0.4), strict=True):  # a cell's width, about
        torch.testing.assert_close(ours[side], theirs[side], atol=step, rtol=0)
        assert (ours[side] != theirs[side]).float().mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_turning(dtype: torch.dtype) -> None:
    x, rotation = Draws(4, dtype)(7, 3, 64), Rotation(64)
    forth, back = (turn(rotation, x, back=back) for back in (False, True))
    if dtype == torch.float32:
        assert torch.equal(forth, rotation.forth(x))
        assert torch.equal(back, rotation.back(x))
    close(forth, rotation.forth(x).to(dtype))
    close(back, rotation.back(x).to(dtype))
    assert turn(None, x, back=True) is x


def attention_layer(
    heads: int, kv_heads: int, head_dim: int, window: int | None = None
) -> AttentionLayer:
    return AttentionLayer(heads, kv_heads, head_dim, head_dim**-0.5, None, window=window)


def dense_pool(rows: Rows, layer: AttentionLayer, draw: Draws) -> Tensor:
    size = (rows.num_pages, *layer.kv.page_shape(layer.num_kv_heads, 1, layer.head_dim))
    return draw(size[0], 2, layer.num_kv_heads, rows.page_size, layer.head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(2))
def test_dense_attention(dtype: torch.dtype, seed: int) -> None:
    """Ragged steps of chunks, decoding rows and rows with drafts; lengths about pages' ends."""
    draw = Draws(seed, dtype)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=draw.generator))]

    page_size = pick(8, 16, 48)
    heads, kv_heads = pick((1, 1), (4, 1), (6, 2), (4, 4), (8, 2))
    layer = attention_layer(heads, kv_heads, pick(16, 64, 80), pick(None, None, 1, 7, 70))
    lengths = [pick(1, page_size - 1, page_size, page_size + 1, 130) for _ in range(pick(1, 3, 4))]
    rows = Rows.shuffled(lengths, page_size, draw.generator)
    spans = [(i, max(n - pick(1, 1, 4, 40), 0), n) for i, n in enumerate(lengths)]
    kv = dense_pool(rows, layer, draw)
    kv[0] = torch.nan  # the null page holds anything
    for row, length in enumerate(lengths):  # and so does what lies behind a row's last position
        if length % page_size:
            kv[int(rows.page_table[row, length // page_size]), :, :, length % page_size :] = 1e4
    batch = on_device(rows.step(spans))
    q = draw(len(batch.positions), heads, layer.head_dim)
    expected = attend_reference(q, kv.nan_to_num(0.0), layer, batch)
    for split in (64, None):
        close(dense_triton.attend(q, kv, layer, batch, split), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_attention_of_wide_heads(dtype: torch.dtype) -> None:
    draw = Draws(13, dtype)
    layer, rows = attention_layer(4, 2, 256), Rows.shuffled([97, 40], 16, draw.generator)
    batch = on_device(rows.step([(0, 96, 97), (1, 20, 40)]))
    kv, q = dense_pool(rows, layer, draw), draw(21, 4, 256)
    close(dense_triton.attend(q, kv, layer, batch, 64), attend_reference(q, kv, layer, batch))


def test_what_was_never_written_is_not_seen() -> None:
    draw = Draws(6)
    layer, rows = attention_layer(4, 2, 16), Rows.shuffled([21, 70], 16, draw.generator)
    batch = on_device(rows.step([(0, 20, 21), (1, 60, 70)]))
    kv = dense_pool(rows, layer, draw)
    expected = attend_reference(q := draw(11, 4, 16), kv, layer, batch)
    kv[0] = torch.nan
    kv[int(rows.page_table[0, 1]), :, :, 5:] = torch.nan
    close(dense_triton.attend(q, kv, layer, batch, 64), expected)


def test_bounds_larger_than_the_step() -> None:
    """As in a captured graph: bounds of a bucket, padded rows on the null page, and tokens that
    belong to padded rows. What the true rows get does not change."""
    draw = Draws(8)
    layer, rows = attention_layer(4, 2, 16), Rows.shuffled([30, 100], 16, draw.generator)
    exact = rows.step([(0, 29, 30), (1, 97, 100)])
    kv, q = dense_pool(rows, layer, draw), draw(8, 4, 16)
    expected = attend_reference(q[:4], kv, layer, on_device(exact))
    table = torch.zeros(4, 32, dtype=torch.int32)
    table[:2, : exact.page_table.shape[1]] = exact.page_table
    padded = dataclasses.replace(
        exact,
        positions=torch.cat([exact.positions, torch.zeros(4, dtype=torch.int64)]),
        query_starts=torch.tensor([0, 1, 4, 6, 8], dtype=torch.int32),
        kv_lengths=torch.tensor([30, 100, 1, 1], dtype=torch.int32),
        page_table=table,
        max_query=4,
        max_kv=512,
    )
    for split in (64, None):
        found = dense_triton.attend(q, kv, layer, on_device(padded), split)
        close(found[:4], expected)
        assert found.isfinite().all()


@pytest.mark.parametrize("window", [None, 50])
def test_a_chunk_is_its_parts(window: int | None) -> None:
    draw = Draws(9)
    layer, rows = attention_layer(4, 1, 16, window), Rows.shuffled([90], 16, draw.generator)
    kv, q = dense_pool(rows, layer, draw), draw(70, 4, 16)

    def part(start: int, stop: int) -> Tensor:
        batch = on_device(rows.step([(0, 20 + start, 20 + stop)]))
        return dense_triton.attend(q[start:stop], kv, layer, batch, 64)

    close(torch.cat([part(0, 37), part(37, 69), part(69, 70)]), part(0, 70))


def test_who_takes_which_pages() -> None:
    """Other formats and heads are torch's; a format's choice is made once, however many layers are
    made of it."""
    ops = TritonOps()
    dense = attention_layer(2, 1, 64)
    assert ops.pages(dense) is ops.pages(dense) is ops.pages(attention_layer(2, 1, 16))
    packed = dataclasses.replace(dense, kv=layer_formats("int8n", 1, 1, 16, 64)[0])
    assert isinstance(ops.pages(packed), PackedPages)
    narrow = dataclasses.replace(dense, kv=layer_formats("int8n", 1, 1, 16, 16)[0])
    windows = layer_formats("k4v2h", 1, 1, 16, 64, sink=8, window=32)[0]
    near = dataclasses.replace(dense, kv=windows)
    assert isinstance(ops.pages(near), PackedPages)
    floats = dataclasses.replace(dense, kv=layer_formats("fp8", 1, 1, 16, 64)[0])
    assert isinstance(ops.pages(floats), FloatPages)
    sealed = dataclasses.replace(dense, kv=layer_formats("oscar2", 1, 1, 32, 64)[0])
    assert isinstance(ops.pages(sealed), SealedPages)
    for each in (dense, packed, near, floats, sealed):
        assert ops.captures(each)
    for other in (
        dataclasses.replace(dense, kv=layer_formats("turbo3", 1, 1, 16, 64)[0]),
        dataclasses.replace(dense, kv=layer_formats("oscar2", 1, 1, 96, 64)[0]),
        dataclasses.replace(narrow, head_dim=16),
        attention_layer(2, 1, 8),
    ):
        assert isinstance(ops.pages(other), TorchOps)
        assert not ops.captures(other), "torch looks at lengths on the host"
    known = len(ops._pages)
    for _ in range(3):
        ops.pages(dataclasses.replace(packed))
    assert len(ops._pages) == known


def test_short_rows_need_nothing_on_the_host() -> None:
    """Chunks go elsewhere; decoding and verification stay with the kernel that can be captured."""

    class Elsewhere:
        name, capturable = "elsewhere", False

        def attend(self, q, kv, layer, batch):
            return torch.full_like(q, 7.0)

    draw = Draws(11)
    layer, rows = attention_layer(4, 2, 16), Rows.shuffled([60, 50], 16, draw.generator)
    kv, ops = dense_pool(rows, layer, draw), TritonOps(DividedAttention(Elsewhere()))
    assert ops.captures(layer)
    assert not TritonOps(Elsewhere()).captures(layer)
    short = on_device(rows.step([(0, 55, 60), (1, 49, 50)]))
    q = draw(6, 4, 16)
    close(ops.attend(q, kv, layer, short), attend_reference(q, kv, layer, short))
    chunk = on_device(rows.step([(0, 0, 40), (1, 49, 50)]))
    assert (ops.attend(draw(41, 4, 16), kv, layer, chunk) == 7.0).all()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for model_type in ("llama", "qwen3"):
        folders[model_type] = tmp_path_factory.mktemp(model_type)
        save(folders[model_type], model_type, head_dim=32, num_hidden_layers=2)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "kv_format", "windows"),
    [
        ("llama", "auto", {}),
        ("qwen3", "auto", {}),
        ("qwen3", "int8n", {}),
        ("llama", "int4h", {}),
        ("qwen3", "int4h", {"sink": 3, "window": 16}),
        ("qwen3", "turbo4", {}),
        ("llama", "fp8", {}),
        ("qwen3", "fp8", {"sink": 3, "window": 16}),
    ],
)
def test_a_whole_model(
    model_type: str, kv_format: str, windows: dict[str, int], checkpoints: dict[str, Path]
) -> None:
    """The logits and choices of `TorchOps`, over steps of chunks, decoding rows and drafts."""
    page_size = 8
    model = load_model(checkpoints[model_type], dtype=torch.float32, device=DEVICE)
    spec = model.spec
    shape = (spec.num_layers, spec.num_kv_heads, page_size, spec.head_dim)
    formats = layer_formats(kv_format, *shape, **windows)
    model.use_formats(formats)
    draw = Draws(1)
    lengths = [29, 12, 18]
    rows = Rows.shuffled(lengths, page_size, draw.generator)
    ids = torch.randint(3, spec.vocab_size, (3, 29), generator=draw.generator)
    steps = [
        [(0, 0, 15), (1, 0, 6)],
        [(0, 15, 25), (1, 6, 7), (2, 0, 13)],  # a chunk after a history beside decoding
        [(0, 25, 26), (1, 7, 11), (2, 13, 16)],  # drafts
        [(2, 14, 17), (1, 9, 10), (0, 26, 29)],  # over drafts that were rejected
    ]
    runners, pools = {}, {}
    for ops in (TorchOps(), TritonOps()):
        runners[ops.name] = EagerRunner(model, ops)
        pools[ops.name] = allocate_pool(
            spec, rows.num_pages, page_size, torch.float32, DEVICE, formats, rows.num_pages
        )
    with torch.inference_mode():
        for spans in steps:
            batch = on_device(rows.step(spans))
            tokens = torch.cat([ids[row, start:stop] for row, start, stop in spans]).to(DEVICE)
            logits = {
                name: runner.logits(runner.forward(tokens, batch, pools[name]))
                for name, runner in runners.items()
            }
            # One rounding to another cell of the codes moves a logit by far more than fp32 does.
            within = 1e-4 if kv_format == "auto" else 5e-2
            torch.testing.assert_close(logits["triton"], logits["torch"], atol=within, rtol=within)
            assert torch.equal(logits["triton"].argmax(-1), logits["torch"].argmax(-1))
