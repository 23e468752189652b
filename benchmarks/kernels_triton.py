"""The Triton kernels: checked against their references, and timed where there is a GPU.

Without a GPU they run in Triton's interpreter on small shapes, and registers, spills and shared
memory come from compiling them for sm_90 ahead of time (`kernels.aot`); nothing is timed. With one,
each is also timed at the shapes of an 8B model against the bandwidth of a copy measured beside it,
and attention against FlashInfer's decoding where that is installed.

Imported after TRITON_INTERPRET is set, see `benchmarks.kernels`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from benchmarks.report import Row, median_interval, table
from kernels import flashinfer
from kernels.attention.paged import attend_reference
from kernels.flashinfer import FlashInferAttention
from kernels.interpreter import interpreted, mend
from kernels.kv.format import DENSE, KVFormat, page_bytes
from kernels.kv.presets import layer_formats
from kernels.ops import AttentionBatch, AttentionLayer
from kernels.sampling import choose_triton, reference
from kernels.sampling.accept import Drafts
from kernels.sampling.processors import History, Penalties
from kernels.sampling.reference import Draws, NoiseKey, Truncation
from kernels.torch_ops import TorchOps
from kernels.triton_ops import TritonOps
from worker.sampler import Form

page_size = 16
formats = ("auto", "int8n", "int4h", "k8v4", "k4v2h", "fp8")
contexts, batches = (1024, 8192, 32768), (1, 16, 64)
# Faster than FlashInfer in bf16 at 32k tokens and 16 rows.
targets = {"int8n": 1.6, "int4h": 2.2}
repeats = 15


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model's layer."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int


small = Shape(4, 2, 64, 192, 320, 9000)
large = Shape(32, 8, 128, 4096, 14336, 128_256)  # Llama-3.1-8B's


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on one input."""

    name: str
    compiled: str  # the line of `kernels.aot` that is about it
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    within: float  # the largest difference that is fine
    element: float  # bytes of an element as it lies in memory
    moved: int  # bytes read and written at least


def check(gpu: bool) -> tuple[str, list[Row]]:
    """The table of errors and of what the compiler said, and its rows."""
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    if not gpu:
        if not interpreted():
            raise SystemExit("without a GPU kernels are checked with TRITON_INTERPRET=1 alone.")
        mend()
    compiled = ahead_of_time()
    lines, rows = [], []
    for case in all_cases(small, rows=3, context=70, dtype=dtype, device=torch.device(device)):
        error = float((case.ours().float() - case.theirs().float()).abs().max())
        found = compiled[case.compiled]
        lines.append(
            (
                case.name,
                f"{error:.1e}",
                f"{case.within:.1e}",
                *(str(found[key]) for key in ("registers", "spilled", "shared")),
                f"{case.element:.3g}",
            )
        )
        rows.append(Row(f"{case.name}: largest error", error, case.within, "at most"))
    spilled = sum(found["spilled"] for name, found in compiled.items() if "attend dense" in name)
    rows.append(Row("attention over dense pages: bytes spilled", spilled, 0, "at most"))
    where = torch.cuda.get_device_name() if gpu else "Triton's interpreter; NOTHING RAN ON HARDWARE"
    header = ("kernel", "error", "allowed", "registers", "spilled", "shared, B", "bytes/element")
    return f"Checked by {where}; registers are those of sm_90.\n\n{table(header, lines)}", rows


def ahead_of_time() -> dict[str, dict[str, int]]:
    """What `kernels.aot` says, by name: in a process that compiles instead of interpreting."""
    environment = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.aot", "--json"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {line.pop("name"): line for line in found}


def all_cases(
    shape: Shape, rows: int, context: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    yield from pointwise(shape, rows, dtype, device)
    yield from sampling(shape, rows, device)
    yield penalties(shape, rows, context, device)
    for name in formats:
        yield from paged(name, shape, rows, context, dtype, device)


def pointwise(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    def draw(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=device)

    plain, ours = TorchOps(), TritonOps()
    size, hidden = dtype.itemsize, shape.hidden
    within = 1e-5 if dtype == torch.float32 else 0.04
    x, residual, weight = draw(rows, hidden), draw(rows, hidden), draw(hidden)
    gate_up = draw(rows, 2 * shape.intermediate)
    yield Case(
        "rms_norm",
        "rms_norm",
        lambda: ours.rms_norm(x, weight, 1e-6),
        lambda: plain.rms_norm(x, weight, 1e-6),
        within,
        size,
        2 * x.nbytes,
    )
    yield Case(
        "add_rms_norm",
        "add rms_norm",
        lambda: ours.add_rms_norm(x, residual.clone(), weight, 1e-6)[0],
        lambda: plain.add_rms_norm(x, residual.clone(), weight, 1e-6)[0],
        within,
        size,
        4 * x.nbytes,
    )
    yield Case(
        "silu_mul",
        "silu_mul",
        lambda: ours.silu_mul(gate_up),
        lambda: plain.silu_mul(gate_up),
        within,
        size,
        gate_up.nbytes * 3 // 2,
    )


def sampling(shape: Shape, rows: int, device: torch.device) -> Iterator[Case]:
    """Choices of a step whose rows are all of one kind, and of one that has them all."""
    logits = torch.randn(rows, shape.vocab, device=device) * 3
    numbers = torch.arange(rows, device=device)
    key, heat = NoiseKey(numbers * 7 + 1, numbers * 0, numbers + 5), torch.ones(rows, device=device)
    off = Truncation(
        torch.full_like(heat, -torch.inf), numbers * 0 + shape.vocab, torch.ones_like(heat).double()
    )
    nucleus, mixed = replace(off, top_p=off.top_p * 0.9), numbers % 3 == 1
    limits = Truncation(off.log_min_p, off.top_k.masked_fill(mixed, 40), nucleus.top_p)
    drafts = Drafts(numbers, numbers // 4, numbers[::4], (numbers[::4] + 3).clamp(max=rows - 1))

    def case(name: str, compiled: str, draws: Draws | None, judged: Drafts | None = None) -> Case:
        def chosen(form: Form) -> Tensor:
            made = form.choose(logits, draws, None, judged)
            return made.tokens if made.accepted is None else torch.cat([made.tokens, made.accepted])

        return Case(
            f"choose {name}",
            compiled,
            lambda: chosen(choose_triton),
            lambda: chosen(reference),
            0.0,
            4,
            logits.nbytes,
        )

    yield case("greedy", "choose scan", None)
    yield case("drawn", "choose draw", Draws(heat, key))
    yield case("by top-k", "truncate collect", Draws(heat, key, replace(limits, top_p=off.top_p)))
    yield case("by top-p", "truncate measure", Draws(heat, key, nucleus))
    heat = heat.masked_fill(numbers % 3 == 2, 0.0)
    yield case("mixed, with drafts", "truncate find", Draws(heat, key, limits), drafts)


def penalties(shape: Shape, rows: int, context: int, device: torch.device) -> Case:
    """Of histories of that length, half of them output."""
    logits = torch.randn(rows, shape.vocab, device=device) * 3
    table = torch.randint(0, shape.vocab, (rows, context), device=device, dtype=torch.int32)
    numbers = torch.arange(rows, device=device)
    history = History(table, numbers, numbers * 0 + context, numbers * 0 + context // 2)
    factor = torch.full((rows,), 1.1, device=device)
    by = Penalties(factor, factor - 1, factor - 0.5)

    def penalized(form: Form) -> Tensor:
        z = logits.clone()
        form.penalize(z, None, history, by)
        return z

    return Case(
        "penalties, and a copy of the logits",
        "penalties apply",
        lambda: penalized(choose_triton),
        lambda: penalized(reference),
        0.0,
        4,
        2 * logits.nbytes + table.nbytes,
    )


def paged(
    name: str, shape: Shape, rows: int, context: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """Appending, decoding and a chunk over pages of one format. The pool is filled by torch."""
    form = layer_formats(name, 1, shape.kv_heads, page_size, shape.head_dim)[0]
    plain, ours = TorchOps(), TritonOps()
    layer = attention_layer(shape, form, device)
    batch, kv = step(shape, form, rows, context, dtype, device, queries=1)
    filled = step(shape, form, rows, context, dtype, device, queries=context)[0]
    heads = shape.heads + 2 * shape.kv_heads
    k, v = (
        torch.randn(rows * context, shape.kv_heads, shape.head_dim, dtype=dtype, device=device)
        for _ in range(2)
    )
    form.append(k, v, kv, filled.kv_slots)
    qkv = torch.randn(rows, heads * shape.head_dim, dtype=dtype, device=device)
    pages = batch.page_table.long()
    kind = "dense" if name == "auto" else name
    sizes = f"{kind} {large.head_dim}"

    def appended(ops: TorchOps | TritonOps) -> Tensor:
        pool = kv.clone()
        q = ops.rope_append(qkv, layer, pool, batch)
        keys, values = form.gather(pool, pages)
        return torch.cat([q.flatten().float(), keys.flatten().float(), values.flatten().float()])

    moved = qkv.nbytes + read_bytes(form, shape, rows, dtype)
    exact = 1e-5 if dtype == torch.float32 else 0.04
    # Another order of sums may round a number to the next cell; with two bits these are wide.
    cells = {"int8n": 0.06, "k8v4": 0.6, "int4h": 0.6, "k4v2h": 2.5, "fp8": 0.6}
    cell = cells.get(name, exact)
    yield Case(
        f"rope, append {kind}",
        "rope append dense, head norms" if kind == "dense" else f"append {sizes}",
        lambda: appended(ours),
        lambda: appended(plain),
        cell,
        element_bytes(form, shape, dtype),
        moved,
    )
    for what, queries in (("decode", 1), ("prefill", min(40, context))):
        asked = step(shape, form, rows, context, dtype, device, queries=queries)[0]
        yield attention(f"attend {kind}, {what}", f"attend {sizes} {what}", layer, kv, asked, dtype)


def attention(
    name: str,
    compiled: str,
    layer: AttentionLayer,
    kv: Tensor,
    batch: AttentionBatch,
    dtype: torch.dtype,
) -> Case:
    tokens, device, ours = len(batch.positions), kv.device, TritonOps()
    q = torch.randn(tokens, layer.num_heads, layer.head_dim, dtype=dtype, device=device)
    shape = Shape(layer.num_heads, layer.num_kv_heads, layer.head_dim, 0, 0, 0)
    positions = batch.page_table.shape[0] * batch.max_kv
    return Case(
        name,
        compiled,
        lambda: ours.attend(q, kv, layer, batch),
        lambda: attend_reference(q, kv, layer, batch),
        1e-4 if dtype == torch.float32 else 0.04,
        element_bytes(layer.kv, shape, dtype),
        read_bytes(layer.kv, shape, positions, dtype) + 2 * q.nbytes,
    )


def read_bytes(form: KVFormat, shape: Shape, positions: int, dtype: torch.dtype) -> int:
    page = page_bytes(form, shape.kv_heads, page_size, shape.head_dim, dtype)
    return page * positions // page_size


def element_bytes(form: KVFormat, shape: Shape, dtype: torch.dtype) -> float:
    """Of one number of a key or value, its share of scales included."""
    return read_bytes(form, shape, 1, dtype) / (2 * shape.kv_heads * shape.head_dim)


def attention_layer(shape: Shape, form: KVFormat, device: torch.device) -> AttentionLayer:
    angles = torch.rand(40_000, shape.head_dim // 2, device=device) * 6
    return AttentionLayer(
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.head_dim**-0.5,
        torch.stack([angles.cos(), angles.sin()], dim=1),
        kv=form,
    )


def step(
    shape: Shape,
    form: KVFormat,
    rows: int,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    queries: int,
) -> tuple[AttentionBatch, Tensor]:
    """The last `queries` tokens of `rows` equal rows over permuted pages, and an empty pool."""
    each = -(-context // page_size)
    generator = torch.Generator().manual_seed(rows)
    order = torch.randperm(rows * each, generator=generator) + 1
    pages = order.view(rows, each).int().to(device)
    position = torch.arange(context - queries, context, device=device).repeat(rows)
    row = torch.arange(rows, device=device).repeat_interleave(queries)
    kv = torch.zeros(
        (rows * each + 1, *form.page_shape(shape.kv_heads, page_size, shape.head_dim)),
        dtype=form.pool_dtype(dtype),
        device=device,
    )
    batch = AttentionBatch(
        positions=position,
        token_rows=row,
        query_starts=torch.arange(rows + 1, dtype=torch.int32, device=device) * queries,
        kv_lengths=torch.full((rows,), context, dtype=torch.int32, device=device),
        page_table=pages,
        kv_slots=pages[row, position // page_size].long() * page_size + position % page_size,
        max_query=queries,
        max_kv=context,
    )
    return batch, kv


def on_gpu(quick: bool) -> tuple[str, list[Row]]:
    """Times of everything at the large shape, against a copy's bandwidth and FlashInfer's decoding.

    Written without a GPU at hand: never run yet.
    """
    device, dtype = torch.device("cuda"), torch.bfloat16
    bandwidth = copy_bandwidth(device)
    lines: list[tuple[str, ...]] = []
    rows = [Row("bandwidth of a copy, GB/s", bandwidth / 1e9)]

    def show(name: str, seconds: float, moved: int, beside: str = "") -> None:
        share = moved / seconds / bandwidth
        lines.append((name, f"{seconds * 1e6:.1f}", f"{share:.2f}", beside))
        rows.append(Row(f"{name}: share of a copy's bandwidth", share))

    for count in batches:
        for case in (
            *pointwise(large, count, dtype, device),
            *sampling(large, count, device),
            penalties(large, count, contexts[0], device),
        ):
            show(f"{case.name}, {count} rows", seconds_of(case.ours), case.moved)
    bare = AttentionLayer(large.heads, large.kv_heads, large.head_dim, 0.1, None)
    theirs = flashinfer.probe(device, dtype, page_size, [bare])
    points = list(product(contexts, batches))
    for context, count in points[:2] if quick else points:
        name = f"batch {count}, {context} tokens"
        other = None
        for kind in formats:
            form = layer_formats(kind, 1, large.kv_heads, page_size, large.head_dim)[0]
            layer = attention_layer(large, form, device)
            batch, kv = step(large, form, count, context, dtype, device, queries=1)
            # Any numbers will do, as long as they are finite.
            kv.random_(0, 60) if kv.dtype == torch.uint8 else kv.normal_()
            case = attention(f"attend {kind}, {name}", "", layer, kv, batch, dtype)
            if form is DENSE and isinstance(theirs, FlashInferAttention):
                q = torch.randn(count, large.heads, large.head_dim, dtype=dtype, device=device)
                run = theirs.attend
                other = seconds_of(lambda: run(q, kv, layer, batch))  # noqa: B023 (called at once)
                show(f"FlashInfer, {name}", other, case.moved)
            seconds = seconds_of(case.ours)
            qkv = torch.randn(
                count,
                (large.heads + 2 * large.kv_heads) * large.head_dim,
                dtype=dtype,
                device=device,
            )
            ops, spent = TritonOps(), qkv.nbytes + read_bytes(form, large, count, dtype)
            append = seconds_of(lambda: ops.rope_append(qkv, layer, kv, batch))  # noqa: B023
            show(f"rope, append {kind}, {name}", append, spent)
            show(case.name, seconds, case.moved, "" if other is None else f"{other / seconds:.2f}")
            if other is not None:
                main_point = (context, count) == (32768, 16)
                target = targets.get(kind) if main_point else None
                rows.append(Row(f"{case.name}: FlashInfer / ours", other / seconds, target))
    if isinstance(theirs, str):
        lines.append((theirs, "", "", ""))
    header = ("kernel", "µs", "share of a copy's bandwidth", "FlashInfer / ours")
    return table(header, lines), rows


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source))


def seconds_of(run: Callable[[], object]) -> float:
    """The median of one call by the GPU's clock, launches included, after warming up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return median_interval(times)[0]
