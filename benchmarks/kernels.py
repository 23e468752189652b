"""What the decoder's operators cost on this machine.

    python -m benchmarks.kernels [--threads 2] [--context 320] [--dtype bfloat16] [--quick]

On a GPU the Triton kernels are checked and timed; on a CPU they are checked in Triton's interpreter
and compiled for sm_90 (`benchmarks.kernels_triton`; `--part native` leaves that out).

The native kernels of a CPU are timed beside eager torch: operators, linear layers and whole steps
of a decoder of the bundled model's shape with random weights, at 1, 8 and 32 rows. Torch's linear
layers are oneDNN's on prepacked weights where those work. Both sides take turns; a time is the
median of the turns, a ratio the median of their ratios with its interval. Building the kernels is
timed as well, from sources to loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import Module

from benchmarks.report import Row, json_line, median_interval, table
from kernels.cpu.build import build, load
from kernels.cpu.ops import NativeOps
from kernels.linear.prepare import prepare_linears
from kernels.ops import AttentionBatch
from kernels.torch_ops import TorchOps
from models.decoder import Decoder, DecoderLayer
from models.layers import Mlp
from models.spec import ModelSpec
from worker.native import native_runner
from worker.runner import EagerRunner

page_size = 16
row_counts = (1, 8, 32)
step_targets = {1: 1.5, 8: 2.5, 32: 6.0}  # milliseconds, bf16 on two cores
shape = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 320,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """One thing done in two ways."""

    name: str
    rows: int
    torch: Callable[[], object]
    native: Callable[[], object]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--threads", type=int, default=torch.get_num_threads())
    add("--context", type=int, default=320, help="positions before the step's token (320)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--repeats", type=int, default=15, help="turns of each side (15)")
    add("--part", choices=("native", "triton"), help="one of both alone")
    add("--quick", action="store_true", help="7 turns")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[args.dtype]
    rows: list[Row] = []
    if args.part != "triton" and not torch.cuda.is_available():
        rows += native_rows(dtype, args.context, 7 if args.quick else args.repeats)
    if args.part != "native":
        rows += triton_rows(args.quick)
    print(json_line("kernels", rows))
    return 0


def triton_rows(quick: bool) -> list[Row]:
    """Prints the tables of the Triton kernels; nothing where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: its kernels are not checked.")
        return []
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # Imported when that is said: a kernel is interpreted or not from its definition on.
    from benchmarks import kernels_triton

    with torch.inference_mode():
        shown, rows = kernels_triton.check(gpu)
        print(shown)
        if gpu:
            shown, timed = kernels_triton.on_gpu(quick)
            print(shown)
            rows += timed
    return rows


def native_rows(dtype: torch.dtype, context: int, repeats: int) -> list[Row]:
    """Prints the table of the CPU's native kernels."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        started = time.perf_counter()
        native = load(build(Path(folder)))
        rows = [Row("build of the native kernels, s", time.perf_counter() - started, 10, "at most")]
        lines = []
        for pair in pairs(native, dtype, context):
            ours, theirs, ratio, low, high = compare(pair, repeats)
            name = f"{pair.name}, {pair.rows} rows"
            lines.append(
                (name, f"{theirs:.1f}", f"{ours:.1f}", f"{ratio:.2f} ({low:.2f} to {high:.2f})")
            )
            rows.append(Row(f"{name}: torch / native", ratio, 1.0, interval=(low, high)))
            if pair.name == "step" and dtype == torch.bfloat16:
                target = step_targets[pair.rows]
                rows.append(Row(f"{name}: native, ms", ours / 1e3, target, "at most"))
    print(table(("operation", "torch, µs", "native, µs", "torch / native"), lines))
    return rows


def compare(pair: Pair, repeats: int) -> tuple[float, float, float, float, float]:
    """Microseconds of native and torch, and the ratio's median and interval."""
    times = []
    calls = [max(1, int(2e-3 / once(way, 3))) for way in (pair.native, pair.torch)]
    for _ in range(repeats):
        times.append((once(pair.native, calls[0]), once(pair.torch, calls[1])))
    ratio, low, high = median_interval([theirs / ours for ours, theirs in times])
    ours, theirs = (median(side) * 1e6 for side in zip(*times, strict=True))
    return ours, theirs, ratio, low, high


def once(run: Callable[[], object], calls: int) -> float:
    """Seconds of one call, over `calls` of them."""
    run()
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls


def pairs(native: NativeOps, dtype: torch.dtype, context: int) -> Iterator[Pair]:
    """Everything that is compared, at every number of rows."""
    spec = ModelSpec.from_hf(shape)
    plain, packed = random_decoder(spec, dtype), random_decoder(spec, dtype)
    layer, dense = plain.layers[0], packed.layers[0]
    assert isinstance(layer, DecoderLayer)
    assert isinstance(dense, DecoderLayer)
    attention, norm = layer.attention.layer, layer.input_norm
    runner = native_runner(plain, native)  # packs the linear layers in place
    prepare_linears(packed, "packed")
    eager = EagerRunner(packed, TorchOps())

    def on(name: str, rows: int, call: Callable[[TorchOps | NativeOps], object]) -> Pair:
        eager_ops = TorchOps()
        return Pair(name, rows, lambda: call(eager_ops), lambda: call(native))

    def linear(name: str, theirs: Module, ours: Module, x: Tensor) -> Pair:
        return Pair(f"linear {name}", x.shape[0], lambda: theirs(x), lambda: ours(x))

    def at(rows: int) -> Iterator[Pair]:
        batch, pages = decode_step(rows, context)
        kv = [
            torch.randn(pages, 2, spec.num_kv_heads, page_size, spec.head_dim, dtype=dtype)
            for _ in range(spec.num_layers)
        ]
        width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        x, residual = torch.randn(2, rows, spec.hidden_size, dtype=dtype)
        qkv = torch.randn(rows, width, dtype=dtype)
        gate_up = torch.randn(rows, 2 * spec.intermediate_size, dtype=dtype)
        half = gate_up[:, : spec.intermediate_size].contiguous()
        q = torch.randn(rows, spec.num_heads, spec.head_dim, dtype=dtype)
        attended, ids = q.flatten(1), torch.randint(0, spec.vocab_size, (rows,))
        yield on("rms_norm", rows, lambda ops: ops.rms_norm(x, norm, 1e-6))
        yield on("add_rms_norm", rows, lambda ops: ops.add_rms_norm(x, residual, norm, 1e-6))
        yield on("silu_mul", rows, lambda ops: ops.silu_mul(gate_up))
        yield on("rope_append", rows, lambda ops: ops.rope_append(qkv, attention, kv[0], batch))
        yield on("attend", rows, lambda ops: ops.attend(q, kv[0], attention, batch))
        yield linear("qkv", dense.attention.qkv, layer.attention.qkv, x)
        yield linear("output", dense.attention.output, layer.attention.output, attended)
        assert isinstance(dense.mlp, Mlp)
        assert isinstance(layer.mlp, Mlp)
        yield linear("gate_up", dense.mlp.gate_up, layer.mlp.gate_up, x)
        yield linear("down", dense.mlp.down, layer.mlp.down, half)
        yield linear("head", packed.head, plain.head, x)
        yield Pair(
            "step",
            rows,
            lambda: eager.logits(eager.forward(ids, batch, kv)),
            lambda: runner.logits(runner.forward(ids, batch, kv)),
        )

    for rows in row_counts:
        yield from at(rows)


def random_decoder(spec: ModelSpec, dtype: torch.dtype) -> Decoder:
    decoder = Decoder(spec, dtype=dtype)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1)
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return decoder


def decode_step(rows: int, context: int) -> tuple[AttentionBatch, int]:
    """One new token in each of `rows` equal rows over permuted pages, and the pool's pages."""
    each = context // page_size + 1
    table = (torch.randperm(rows * each) + 1).view(rows, each).int()
    positions = torch.full((rows,), context)
    batch = AttentionBatch(
        positions=positions,
        token_rows=torch.arange(rows),
        query_starts=torch.arange(rows + 1, dtype=torch.int32),
        kv_lengths=(positions + 1).int(),
        page_table=table,
        kv_slots=table[:, -1].long() * page_size + context % page_size,
        max_query=1,
        max_kv=context + 1,
    )
    return batch, rows * each + 1


if __name__ == "__main__":
    raise SystemExit(main())
