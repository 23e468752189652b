"""Compiles every Triton kernel for sm_90 ahead of time, without a GPU: `python -m kernels.aot`.

For the constants that a server uses. It shows what a GPU would refuse or be slow with: too many
registers, spills, too much shared memory. Needs Triton, whose wheels bring the assembler along.
"""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.attention import packed_triton
from kernels.kv import append_triton
from kernels.kv.paged import Paged
from kernels.kv.presets import PRESETS
from kernels.kv.triton_launch import Launch
from kernels.linear import quantized_triton
from kernels.linear.formats import Fp8Format, IntFormat, WeightFormat
from kernels.sampling import gumbel_triton
from kernels.sampling.philox import GUMBEL_SPAN, NOISE_VERSION

TARGET = GPUTarget("cuda", 90, 32)
MOST_SHARED = 227 * 1024  # bytes of shared memory that a block of sm_90 may have
ALIGNED = 16  # bytes: what Triton specialises pointers and integers for

KV_FORMATS = ("int8n", "int4h", "int4h64", "k8v4", "k4v2h")
HEAD_DIMS = (64, 128)
KV_HEADS, PAGE_SIZE, GROUP = 8, 16, 4  # of a model of common shape
NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}  # as Triton has them
# Query tokens of a row: decoding (few drafts are the same), a prompt's chunk.
QUERIES = {"decode": 1, "prefill": 512}
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
    aligned: frozenset[str]  # arguments that are multiples of ALIGNED
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiled kernel needs."""

    name: str
    registers: int  # a thread
    spilled: int  # bytes a thread, stores and loads together
    stack: int  # bytes a thread
    shared: int  # bytes a block
    warps: int
    cubin: bytes

    @property
    def fits(self) -> bool:
        return self.shared <= MOST_SHARED


def jobs() -> Iterator[Job]:
    """All that a server on a GPU may launch."""
    for preset, head_dim in itertools.product(KV_FORMATS, HEAD_DIMS):
        paged = _paged(preset, head_dim)
        name = f"{preset} {head_dim}"
        yield _append(f"append {name}", paged)
        for what, queries in QUERIES.items():
            yield _attend(f"attend {name} {what}", paged, queries)
    for head_dim in HEAD_DIMS:
        yield _attend(f"attend int4h {head_dim} window", _paged("int4h", head_dim), 1, window=True)
        coarse = _paged("int8n", head_dim).coarse()
        yield _attend(f"attend int8n {head_dim} coarse", coarse, 1)
        for what, queries in QUERIES.items():
            name = f"attend int8n {head_dim} {what} fp32"
            yield _attend(name, _paged("int8n", head_dim), queries, dtype=torch.float32)
        yield _merge(head_dim)
    yield from _draw(blocks=38)  # a vocabulary of about 150,000
    for form, rows in itertools.product(WEIGHTS, (16, 64)):
        yield _weight(form, rows)


def compile_job(job: Job) -> Compiled:
    """Raises what Triton raises for a kernel that does not compile."""
    names = job.kernel.arg_names
    signature = {name: job.types.get(name, "constexpr") for name in names}
    attributes = {
        (i,): [["tt.divisibility", ALIGNED]] for i, name in enumerate(names) if name in job.aligned
    }
    source = ASTSource(job.kernel, signature, dict(job.constants), attributes)
    compiled = triton.compile(source, target=TARGET, options=dict(job.options))
    registers, stack, spilled = _assembled(compiled.asm["ptx"])
    metadata = compiled.metadata
    return Compiled(
        job.name,
        registers,
        spilled,
        stack,
        metadata.shared,
        metadata.num_warps,
        compiled.asm["cubin"],
    )


def _assembled(ptx: str) -> tuple[int, int, int]:
    """Registers, bytes of stack and of spills, as the assembler tells them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            "--gpu-name=sm_90a",
            str(source),
            "-o",
            str(source.with_suffix(".cubin")),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said
    )
    registers = re.search(r"Used (\d+) registers", said)
    if spills is None or registers is None:
        raise RuntimeError(f"the assembler said something else than expected: {said}")
    return int(registers[1]), int(spills[1]), int(spills[2]) + int(spills[3])


def _paged(preset: str, head_dim: int) -> Paged:
    found = PRESETS[preset]
    keys, values = found.keys(), found.values()
    return Paged(KV_HEADS, PAGE_SIZE, head_dim, keys, values, rotated=found.rotated)


def _append(name: str, paged: Paged) -> Job:
    launch = append_triton.append_launch(paged)
    types = {
        "k": "*bf16",
        "v": "*bf16",
        "kv": "*u8",
        "kv_slots": "*i64",
        "key_mean": "*fp32",
        "signs": "*fp32",
        "tokens": "i32",
        "k_stride": "i32",
        "v_stride": "i32",
        "page_stride": "i32",
    }
    options = {"enable_fp_fusion": False}
    return _job(name, append_triton._append, types, launch, {"tokens"}, options)


def _attend(
    name: str,
    paged: Paged,
    queries: int,
    window: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Job:
    launch = packed_triton.attend_launch(paged, GROUP, queries, window, dtype)
    types = {
        "q": NAMES[dtype],
        "kv": "*u8",
        "positions": "*i64",
        "query_starts": "*i32",
        "kv_lengths": "*i32",
        "page_table": "*i32",
        "out": "*fp32",
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
    odd = {"rows", "tokens", "table_stride", "window", "scale"}
    return _job(name, packed_triton._attend, types, launch, odd)


def _merge(head_dim: int) -> Job:
    launch = Launch({"n": head_dim, "tile": packed_triton.MERGE_TILE}, 4, 3)
    types = {"parts": "*fp32", "lse": "*fp32", "out": "*bf16", "splits": "i32", "rows": "i32"}
    return _job(f"merge {head_dim}", packed_triton._merge, types, launch, {"splits", "rows"})


def _weight(form: WeightFormat, rows: int) -> Job:
    """A product by one of Qwen3-8B's matrices, its inputs in splits."""
    meta = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    weight = form.quantize(meta)
    types = {
        "x": "*bf16",
        "low": "*fp8e4nv" if isinstance(form, Fp8Format) else "*u8",
        "high": "*fp8e4nv" if isinstance(form, Fp8Format) else "*u8",
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


def _draw(blocks: int) -> Iterator[Job]:
    size = gumbel_triton._BLOCK
    numbers = {"vocab": "i32", "blocks": "i32"}
    types = {"logits": "*fp32", "maxima": "*fp32"} | numbers
    launch = Launch({"size": size}, 4, 3)
    yield _job("draw: maxima", gumbel_triton._block_maxima, types, launch, {"blocks"})
    types = {
        "logits": "*fp32",
        "maxima": "*fp32",
        "temperature": "*fp32",
        "seed": "*i64",
        "choice": "*i64",
        "position": "*i64",
        "scores": "*fp32",
        "tokens": "*i32",
    } | numbers
    constants = {
        "size": size,
        "room": 1 << math.ceil(math.log2(blocks)),
        "span": GUMBEL_SPAN,
        "version": NOISE_VERSION,
    }
    launch = Launch(constants, 4, 3)
    yield _job("draw: noise", gumbel_triton._draw_block, types, launch, {"blocks"})


def _job(
    name: str,
    kernel: Any,
    types: dict[str, str],
    launch: Launch,
    odd: set[str],
    options: Mapping[str, Any] | None = None,
) -> Job:
    """`odd`: integers that need not be multiples of ALIGNED."""
    chosen = {"num_warps": launch.warps, "num_stages": launch.stages, **(options or {})}
    return Job(name, kernel, types, launch.constants, frozenset(types) - odd, chosen)


def main(show: Callable[[str], object] = print) -> int:
    """A line for each kernel; 1 if any does not compile or needs too much shared memory."""
    failed = 0
    show(f"{'kernel':<30} registers  spilled  stack  shared  warps")
    for job in jobs():
        try:
            made = compile_job(job)
        except Exception as error:
            failed += 1
            show(f"{job.name:<30} does not compile: {error}")
            continue
        failed += not made.fits
        show(
            f"{made.name:<30} {made.registers:>9} {made.spilled:>8} {made.stack:>6}"
            f" {made.shared:>7} {made.warps:>6}"
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
