"""Compiles every Triton kernel for sm_90 ahead of time, without a GPU: `python -m kernels.aot`.

For the constants that a server uses, see `kernels.aot_jobs`. It shows what a GPU would refuse or be
slow with: too many registers, spills, too much shared memory. Needs Triton, whose wheels bring the
assembler along.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.aot_jobs import Job, jobs

TARGET = GPUTarget("cuda", 90, 32)
MOST_SHARED = 227 * 1024  # bytes of shared memory that a block of sm_90 may have
ALIGNED = 16  # bytes: what Triton specialises pointers and integers for
# What every start without a format does must not spill, nor what the same kernel does for floats.
NEVER_SPILLS = re.compile(
    r"attend (dense|fp8) \d+ (decode|verify|prefill|window)( fp32)?( scales)?( windows)?$"
)


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiled kernel needs."""

    name: str
    registers: int  # a thread
    spilled: int  # bytes a thread, stores and loads together
    stack: int  # bytes a thread
    shared: int  # bytes a block
    warps: int

    @property
    def fault(self) -> str | None:
        """Why it must not be shipped, None if it may."""
        if self.shared > MOST_SHARED:
            return f"needs more than {MOST_SHARED} bytes of shared memory"
        if self.spilled and NEVER_SPILLS.search(self.name):
            return "spills"
        return None


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


def compile_number(number: int) -> Compiled | str:
    """Of `jobs()`: in another process, which kernels cannot be sent to. A sentence if it fails."""
    job = list(jobs())[number]
    try:
        return compile_job(job)
    except Exception as error:
        return f"{job.name} does not compile: {error}"


def main(arguments: Sequence[str] = (), show: Callable[[str], object] = print) -> int:
    """A line for each kernel; 1 if any does not compile, needs too much or must not spill."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__)
    parser.add_argument("--json", action="store_true", help="a JSON object a kernel, no table")
    as_json = parser.parse_args(arguments).json
    failed = 0
    if not as_json:
        show(f"{'kernel':<32} registers  spilled  stack  shared  warps")
    fresh = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    with ProcessPoolExecutor(mp_context=fresh) as pool:
        for made in pool.map(compile_number, range(len(list(jobs())))):
            if isinstance(made, str):
                failed += 1
                print(made, file=sys.stderr) if as_json else show(made)
            elif as_json:
                failed += made.fault is not None
                show(json.dumps(asdict(made)))
            else:
                failed += made.fault is not None
                show(
                    f"{made.name:<32} {made.registers:>9} {made.spilled:>8} {made.stack:>6}"
                    f" {made.shared:>7} {made.warps:>6}  {made.fault or ''}".rstrip()
                )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
