"""What `kernels.aot` compiles: every Triton kernel, with the constants that a server uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch

from kernels import activation_triton, norm_triton, rope_triton
from kernels.attention import dense_triton, packed_triton
from kernels.attention import split as split_triton
from kernels.kv import append_triton, rotation_triton, seal_triton
from kernels.kv.paged import Paged
from kernels.kv.presets import PRESETS, SEALED, LayerPages
from kernels.kv.scales import HeadScales
from kernels.kv.sealed import Sealed
from kernels.kv.triton_launch import Launch
from kernels.kv.windows import Windows
from kernels.linear import quantized_triton
from kernels.linear.formats import Fp8Format, IntFormat, WeightFormat
from kernels.ops import AttentionLayer
from kernels.sampling import choose_triton, penalize_triton, truncate_triton

# A model of common shape, that of Llama-3.1-8B and Qwen3-8B; the vocabulary is the latter's.
HIDDEN, KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE, VOCAB = 4096, 8, 4, 128, 16, 151_936
# Formats by head size: heads of 64 are small models', which need few formats.
KV_FORMATS = {128: ("int8n", "int4h", "int4h64", "k8v4", "k4v2h"), 64: ("int8n", "int4h")}
NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}  # as Triton has them
# Query tokens of a row: decoding (few drafts are the same), verification, a prompt's chunk.
QUERIES = {"decode": 1, "verify": 5, "prefill": 512}
WEIGHTS: tuple[WeightFormat, ...] = (
    IntFormat(8, None),
    IntFormat(8, 128),
    IntFormat(6, 128),
    IntFormat(4, 128),
    IntFormat(4, 32),
    IntFormat(4, 128, zero_point=True),
    Fp8Format(128),
)


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel with one set of constants."""

    name: str
    kernel: Any
    types: Mapping[str, str]  # of arguments that are no constants, as Triton writes them
    constants: Mapping[str, Any]
    aligned: frozenset[str]  # arguments that are multiples of 16 bytes or numbers
    options: Mapping[str, Any]


def jobs() -> Iterator[Job]:
    """All that a server on a GPU may launch."""
    for added in (False, True):
        yield _norm("add rms_norm" if added else "rms_norm", added)
    yield _silu()
    yield _rope("rope append dense", normed=False, dense=True)
    yield _rope("rope append dense, head norms", normed=True, dense=True)
    yield _rope("rope packed, head norms", normed=True, dense=False)
    for back in (False, True):
        yield _turn("turn back" if back else "turn", back)
    for head_dim in KV_FORMATS:
        for what, queries in QUERIES.items():
            yield _attend_dense(f"attend dense {head_dim} {what}", head_dim, queries)
        yield _merge(head_dim)
    yield _attend_dense("attend dense 128 window", 128, 1, window=True)
    for what in ("decode", "prefill"):
        queries = QUERIES[what]
        for head_dim in (128, 256):
            name = f"attend dense {head_dim} {what} fp32"
            yield _attend_dense(name, head_dim, queries, dtype=torch.float32)
        yield _attend_dense(f"attend dense 256 {what}", 256, queries)
    for head_dim, presets in KV_FORMATS.items():
        for preset in presets:
            paged = _paged(preset, head_dim)
            yield _append(f"append {preset} {head_dim}", paged)
            for what in ("decode", "prefill"):
                yield _attend(f"attend {preset} {head_dim} {what}", paged, QUERIES[what])
    yield _attend("attend int4h 128 window", _paged("int4h", 128), 1, window=True)
    near = Windows(sink=64, block=128)
    yield _append("append int8n 128 windows", _paged("int8n", 128, near))
    for what in ("decode", "prefill"):
        yield _attend(f"attend k4v2h 128 {what} windows", _paged("k4v2h", 128, near), QUERIES[what])
    yield _attend("attend int8n 128 coarse", _paged("int8n", 128).coarse(), 1)
    for what in ("decode", "prefill"):
        paged = _paged("int8n", 128, halves=True)
        yield _attend(f"attend int8n 128 halves {what}", paged, QUERIES[what])
    for what in ("decode", "prefill"):
        name = f"attend int8n 128 {what} fp32"
        yield _attend(name, _paged("int8n", 128), QUERIES[what], dtype=torch.float32)
    yield from _floats()
    yield from _sealed_pages()
    for form in WEIGHTS:
        for rows in (16, 64):
            yield _weight(form, rows)
    yield from _choice()
    yield from _penalties()


def _floats() -> Iterator[Job]:
    """Pages of eight-bit floats, whose heads have scales after a calibration alone."""
    near = Windows(sink=64, block=128)
    yield _append("append fp8 128", _paged("fp8", 128))
    yield _append("append fp8 128 scales", _paged("fp8", 128, scaled=True))
    yield _append("append fp8 128 scales windows", _paged("fp8", 128, near, scaled=True))
    yield _append("append fp8 64", _paged("fp8", 64))
    for what, queries in QUERIES.items():
        yield _attend_floats(f"attend fp8 128 {what}", queries, scaled=False)
    for what in ("decode", "prefill"):
        queries = QUERIES[what]
        yield _attend_floats(f"attend fp8 64 {what}", queries, head_dim=64, scaled=False)
        yield _attend_floats(f"attend fp8 128 {what} scales", queries)
        yield _attend_floats(f"attend fp8 128 {what} windows", queries, windows=near)
        yield _attend_floats(f"attend fp8 256 {what}", queries, head_dim=256, scaled=False)
        yield _attend_floats(f"attend fp8 128 {what} fp32", queries, dtype=torch.float32)


def _sealed_pages() -> Iterator[Job]:
    for head_dim, page_size in ((128, 32), (128, 64), (64, 32)):
        pages = LayerPages(KV_HEADS, page_size, head_dim, windows=Windows(64, 128))
        form = SEALED["oscar2"].form(pages)
        sizes = f"oscar2 {head_dim}, pages of {page_size}"
        if page_size == 32:
            yield _append(f"append oscar2 {head_dim}", form)
        types = {"kv": "*u8", "kv_slots": "*i64", "copies": "*bf16", "copy_slots": "*i64"}
        types["page_stride"] = "i32"
        launch = seal_triton.seal_launch(form)
        exact = {"enable_fp_fusion": False}
        yield _job(f"seal {sizes}", seal_triton._seal, types, launch, {"page_stride"}, exact)
        for what in ("decode", "prefill"):
            yield _attend(f"{what} {sizes}", form, QUERIES[what])


def _norm(name: str, added: bool) -> Job:
    types = {"x": "*bf16", "residual": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32"}
    return _job(name, norm_triton._rms_norm, types, norm_triton.norm_launch(HIDDEN, added), {"eps"})


def _silu() -> Job:
    types = {"gate_up": "*bf16", "out": "*bf16", "size": "i32"}
    return _job("silu_mul", activation_triton._silu_mul, types, activation_triton.silu_launch())


def _layer(head_dim: int = HEAD_DIM, window: bool = False, normed: bool = False) -> AttentionLayer:
    norm = torch.empty(head_dim) if normed else None
    table = torch.empty(1, 2, head_dim // 2)
    return AttentionLayer(
        *(KV_HEADS * GROUP, KV_HEADS, head_dim, 1.0, table, norm, norm),
        window=4096 if window else None,
    )


def _rope(name: str, *, normed: bool, dense: bool) -> Job:
    launch = rope_triton.rope_launch(_layer(normed=normed), PAGE_SIZE if dense else None)
    types = {
        **dict.fromkeys(("qkv", "q_norm", "k_norm", "out", "kv"), "*bf16"),
        "cos_sin": "*fp32",
        "positions": "*i64",
        "kv_slots": "*i64",
        "qkv_stride": "i32",
        "page_stride": "i32",
        "eps": "fp32",
    }
    return _job(name, rope_triton._rope, types, launch, {"eps"})


def _turn(name: str, back: bool) -> Job:
    types = {"x": "*bf16", "signs": "*fp32", "out": "*bf16", "rows": "i32"}
    launch = rotation_triton.turn_launch(HEAD_DIM, back)
    return _job(name, rotation_triton._turn, types, launch, {"rows"}, {"enable_fp_fusion": False})


def _attend_dense(
    name: str,
    head_dim: int,
    queries: int,
    window: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Job:
    launch = dense_triton.attend_launch(_layer(head_dim, window), PAGE_SIZE, queries, dtype)
    types = {**_attend_types(queries, dtype), "kv": NAMES[dtype]}
    absent = dense_triton.FLOATS_ALONE
    return _job(name, dense_triton._attend, types, launch, ODD, absent=absent)


def _attend_floats(
    name: str,
    queries: int,
    *,
    head_dim: int = HEAD_DIM,
    scaled: bool = True,
    windows: Windows | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Job:
    layer = _layer(head_dim)
    launch = dense_triton.attend_launch(layer, PAGE_SIZE, queries, dtype, windows)
    more = {
        "head_scales": "*fp32",
        "copies": NAMES[dtype],
        "copies_table": "*i32",
        "copies_stride": "i32",
    }
    assert more.keys() == set(dense_triton.FLOATS_ALONE)
    absent = set() if scaled else {"head_scales"}
    if windows is None:
        absent |= more.keys() - {"head_scales"}
    types = {**_attend_types(queries, dtype), **more, "kv": "*fp8e4nv"}
    odd = ODD | {"copies_stride"}
    return _job(name, dense_triton._attend, types, launch, odd, absent=absent)


# Integers of attention that need not be multiples of 16, and the scale.
ODD = {"rows", "tokens", "table_stride", "window", "scale"}


def _attend_types(queries: int, dtype: torch.dtype) -> dict[str, str]:
    return {
        "q": NAMES[dtype],
        "kv": "*u8",
        "positions": "*i64",
        "query_starts": "*i32",
        "kv_lengths": "*i32",
        "page_table": "*i32",
        # Of chunks there is one split, whose outputs are the result.
        "out": NAMES[dtype] if queries == QUERIES["prefill"] else "*fp32",
        "lse": "*fp32",
        "rows": "i32",
        "tokens": "i32",
        "q_stride": "i32",
        "page_stride": "i32",
        "table_stride": "i32",
        "split": "i32",
        "window": "i32",
        "scale": "fp32",
    }


def _paged(
    preset: str,
    head_dim: int,
    windows: Windows | None = None,
    *,
    halves: bool = False,
    scaled: bool = False,
) -> Paged:
    zeros = torch.zeros(KV_HEADS, dtype=torch.int64)
    scales = HeadScales(zeros, zeros) if scaled else None
    pages = LayerPages(KV_HEADS, PAGE_SIZE, head_dim, windows=windows, halves=halves, scales=scales)
    return PRESETS[preset].form(pages)


def _append(name: str, paged: Paged | Sealed) -> Job:
    launch = append_triton.append_launch(paged)
    types = {
        "k": "*bf16",
        "v": "*bf16",
        "kv": "*u8",
        "kv_slots": "*i64",
        "key_mean": "*fp32",
        "signs": "*fp32",
        # Without windows these are the pool and its slots.
        "copies": "*u8" if paged.windows is None else "*bf16",
        "copy_slots": "*i64",
        "head_scales": "*fp32",
        "tokens": "i32",
        "k_stride": "i32",
        "v_stride": "i32",
        "page_stride": "i32",
    }
    scaled = isinstance(paged, Paged) and paged.scales is not None
    absent = set() if scaled else {"head_scales"}
    options = {"enable_fp_fusion": False}
    return _job(name, append_triton._append, types, launch, {"tokens"}, options, absent)


def _attend(
    name: str,
    paged: Paged | Sealed,
    queries: int,
    window: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Job:
    launch = packed_triton.attend_launch(paged, GROUP, queries, window, dtype)
    types = {
        **_attend_types(queries, dtype),
        # Without windows these are the pool and its table.
        "copies": "*u8" if paged.windows is None else NAMES[dtype],
        "copies_table": "*i32",
        "copies_stride": "i32",
    }
    return _job(name, packed_triton._attend, types, launch, ODD | {"copies_stride"})


def _merge(head_dim: int) -> Job:
    launch = split_triton.merge_launch(head_dim)
    types = {"parts": "*fp32", "lse": "*fp32", "out": "*bf16", "splits": "i32", "rows": "i32"}
    return _job(f"merge {head_dim}", split_triton._merge, types, launch, {"splits", "rows"})


def _weight(form: WeightFormat, rows: int) -> Job:
    """A product by one of Qwen3-8B's matrices, its inputs in splits."""
    meta = torch.empty(HIDDEN, HIDDEN, dtype=torch.bfloat16, device="meta")
    weight = form.quantize(meta)
    codes = "*fp8e4nv" if isinstance(form, Fp8Format) else "*u8"
    types = {
        "x": "*bf16",
        "low": codes,
        "high": codes,
        "scales": NAMES[weight.scales.dtype],
        "zeros": "*u8",
        "out": "*fp32",
        "rows": "i32",
        "inputs": "i32",
        "outputs": "i32",
        "groups": "i32",
        "split_tiles": "i32",
    }
    launch = quantized_triton.product_launch(weight, rows)
    zeros = " zeros" if weight.zeros is not None else ""
    name = f"weight {form.name.split()[0]} {form.group or 'row'}{zeros} x {rows}"
    odd = {"rows", "groups", "split_tiles"}
    return _job(name, quantized_triton._multiply, types, launch, odd)


def _choice() -> Iterator[Job]:
    """Of tokens: what every step runs, what steps that draw do, and what steps that truncate do."""
    size = choose_triton.block_size(VOCAB)
    blocks = -(-VOCAB // size)
    rows = {"logits": "*fp32", "maxima": "*fp32"}
    sizes, odd = {"vocab": "i32", "blocks": "i32"}, {"blocks"}

    types = {**rows, "best": "*i32", **sizes}
    yield _job("choose scan", choose_triton._scan, types, choose_triton.scan_launch(VOCAB), odd)

    types |= {"temperature": "*fp32", "scores": "*fp32", "tokens": "*i32"}
    types |= dict.fromkeys(("seed", "choice", "position"), "*i64")
    last = dict.fromkeys(("last_depth", "last_token"), "*i32")
    launch = choose_triton.draw_launch(VOCAB)
    yield _job("choose draw", choose_triton._draw, types, launch, odd, absent=last)
    yield _job("choose draw, truncated", choose_triton._draw, types | last, launch, odd)

    types = {"maxima": "*fp32", "scores": "*fp32", "best": "*i32", "blocks": "i32"}
    types |= {"tokens": "*i64", "usable": "*i1"}
    more = {"raw_usable": "*i1", "judged": "*i32"}
    more |= dict.fromkeys(("first", "last", "accepted"), "*i64")
    launch = choose_triton.conclude_launch(blocks)
    yield _job("choose conclude", choose_triton._conclude, types, launch, odd, absent=more)
    yield _job("choose conclude, drafts", choose_triton._conclude, types | more, launch, odd)

    types = {
        **rows,
        "temperature": "*fp32",
        "log_min_p": "*fp32",
        "top_k": "*i64",
        "top_p": "*fp64",
    }
    types |= sizes
    measured = {"counts": "*i32", "masses": "*fp32"}
    listed = {"values": "*fp32", "ids": "*i32", "found": "*i32", "floor": "*i32"}
    found = {"totals": "*fp64", "depth": "*i32", "token": "*i32"}
    for name, kernel, launch, arrays in (
        (
            "truncate measure",
            truncate_triton._measure,
            truncate_triton.measure_launch(size, blocks),
            measured | {"totals": "*fp64"},
        ),
        (
            "truncate collect",
            truncate_triton._collect,
            truncate_triton.collect_launch(size, blocks),
            measured | listed,
        ),
        (
            "truncate find",
            truncate_triton._find,
            truncate_triton.find_launch(blocks),
            listed | found,
        ),
    ):
        yield _job(name, kernel, types | arrays, launch, odd)


def _penalties() -> Iterator[Job]:
    """Of all rows of a step, and of some."""
    launch, odd = penalize_triton.penalize_launch(), {"table_stride"}
    types = {"counts": "*i32", "table": "*i32", "vocab": "i32", "table_stride": "i32"}
    types |= dict.fromkeys(("slot", "position"), "*i64")
    exact = {"enable_fp_fusion": False}
    counted = types | {"prompt_len": "*i64"}
    yield _job("penalties count", penalize_triton._count, counted, launch, odd, exact)
    types |= dict.fromkeys(("z", "repetition", "frequency", "presence"), "*fp32")
    kernel, rows = penalize_triton._apply, {"rows": "*i64"}
    yield _job("penalties apply", kernel, types, launch, odd, exact, rows)
    yield _job("penalties apply, some", kernel, types | rows, launch, odd, exact)


def _job(
    name: str,
    kernel: Any,
    types: dict[str, str],
    launch: Launch,
    odd: AbstractSet[str] = frozenset(),
    options: Mapping[str, Any] | None = None,
    absent: Iterable[str] = (),
) -> Job:
    """`odd`: numbers that need not be multiples of 16; `absent`: arguments that are None."""
    absent = frozenset(absent)
    types = {key: kind for key, kind in types.items() if key not in absent}
    chosen = {"num_warps": launch.warps, "num_stages": launch.stages, **(options or {})}
    constants = launch.constants | dict.fromkeys(absent)
    return Job(name, kernel, types, constants, frozenset(types) - odd, chosen)
