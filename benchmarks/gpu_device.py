"""The device that `gpu_check` and `gpu_bench` are about: what it is, and what it can do at most."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.report import Row, commit, json_line, machine

PACKAGES = ("torch", "triton", "flashinfer-python", "vllm", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run takes place; on a CPU it is a dry run, about which nothing is claimed."""

    device: str  # for torch, and for the engine's option
    dry: bool

    @classmethod
    def choose(cls, dry: bool) -> Machine:
        """Raises `SystemExit` where there is no GPU and no dry run was asked for."""
        if dry:
            return cls("cpu", True)
        if not torch.cuda.is_available():
            raise SystemExit("torch finds no CUDA GPU here; --dry-run tries everything without.")
        return cls("cuda", False)

    def facts(self) -> dict[str, object]:
        """For the record."""
        versions = {}
        for name in PACKAGES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        facts: dict[str, object] = {"host": machine(), "commit": commit(), "versions": versions}
        if not self.dry:
            facts["gpu"] = torch.cuda.get_device_name()
            facts["cuda"] = torch.version.cuda
            facts["driver"] = _nvidia_smi("driver_version")
            facts["clocks"] = _nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem")
        return facts

    def seconds(self, run: Callable[[], object], calls: int = 10) -> float:
        """Of one call: the median of five turns of `calls` each, after one that warms up."""
        times = []
        for _ in range(6):
            self.finish()
            started = time.perf_counter()
            for _ in range(calls):
                run()
            self.finish()
            times.append((time.perf_counter() - started) / calls)
        return median(times[1:])

    def finish(self) -> None:
        """Waits for the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Gives memory back that torch keeps."""
        if not self.dry:
            torch.cuda.empty_cache()


def _nvidia_smi(what: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@dataclass(frozen=True, slots=True)
class Rates:
    """What the device was measured to do at most."""

    copy: float  # bytes a second, read and written, of a copy
    read: float  # bytes a second of a sum over bf16 numbers
    matmul: float  # operations a second of a bf16 matrix product


def measure_rates(on: Machine) -> Rates:
    size = 1 << (20 if on.dry else 32)  # bytes: far beyond the caches
    side = 256 if on.dry else 8192
    with torch.inference_mode():
        product = _product(on, side)
        copied, read = _passes(on, size)
    on.free()
    return Rates(copied, read, product)


def _product(on: Machine, side: int) -> float:
    a, b = torch.randn(2, side, side, device=on.device, dtype=torch.bfloat16)
    return 2 * side**3 / on.seconds(lambda: a @ b)


def _passes(on: Machine, size: int) -> tuple[float, float]:
    source = torch.randn(size // 2, device=on.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = 2 * size / on.seconds(lambda: target.copy_(source))
    return copied, size / on.seconds(lambda: source.sum(dtype=torch.float32))


def record(benchmark: str, on: Machine, rows: Sequence[Row], **more: object) -> str:
    """The last line of the output: as every benchmark's, with the device and what else there is."""
    made = json.loads(json_line(benchmark, rows))
    return json.dumps({**made, "dry_run": on.dry, "device": on.facts(), **more})


def roomy_folder(wanted: int, asked: Path | None) -> Path:
    """A folder with so many bytes free: `asked`, or memory, or where temporary files go.

    Raises `SystemExit` if there is none.
    """
    places = [asked] if asked else [Path("/dev/shm"), Path("/tmp"), Path.cwd()]
    for place in places:
        if place.is_dir():
            facts = os.statvfs(place)
            if facts.f_bavail * facts.f_frsize >= wanted and os.access(place, os.W_OK):
                return place
    tried = ", ".join(map(str, places))
    raise SystemExit(f"{wanted / 1e9:.0f} GB are needed for models, but not free in {tried}.")
