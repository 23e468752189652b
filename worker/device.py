"""The device, chosen once at start-up: where tensors live, how much memory there is."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from worker.sizing import GIB

# A CPU machine is shared with everything else on it; a larger pool has to be asked for.
CPU_POOL_CAP = 4 * GIB
CGROUP = Path("/sys/fs/cgroup")
# Page-locked host memory for the pages of paused sequences, if a quarter of what is free allows it.
GPU_SWAP_BYTES = 4 * GIB
# Tokens from which on a step is bound by arithmetic: longer steps only delay the first token.
CPU_STEP_TOKENS, GPU_STEP_TOKENS = 256, 2048


class DeviceError(Exception):
    """The configured device or dtype is not there. The message is one sentence for a person."""


@dataclass(frozen=True, slots=True)
class Device:
    """Facts of the device the worker computes on."""

    torch_device: torch.device
    name: str
    total_memory: int
    pool_cap: int | None
    step_tokens: int  # default token budget of one step
    ranks: int = 1  # that share the memory

    def available_memory(self) -> int:
        """Bytes that could be allocated now."""
        if self.torch_device.type == "cuda":
            return torch.cuda.mem_get_info(self.torch_device)[0]
        return available_host_memory() // self.ranks

    def default_swap_bytes(self) -> int:
        """On a CPU none: there the memory is better spent on a larger pool."""
        if self.torch_device.type == "cpu":
            return 0
        return min(GPU_SWAP_BYTES, available_host_memory() // 4)

    def default_dtype(self, checkpoint: torch.dtype) -> torch.dtype:
        """The checkpoint's dtype where the device computes it natively, else float32."""
        if checkpoint != torch.float32 and self.torch_device.type == "cpu":
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            return torch.bfloat16 if native else torch.float32
        return checkpoint


def resolve_device(name: str, rank: int = 0, ranks: int = 1) -> Device:
    """`auto` takes CUDA when there is a GPU. Of several ranks, each has a GPU of its own, or its
    share of the CPU. Raises `DeviceError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise DeviceError(f"device {name!r} was asked for, but torch finds no CUDA GPU.")
        if ranks > torch.cuda.device_count():
            raise DeviceError(
                f"{ranks} ranks need as many GPUs; torch finds {torch.cuda.device_count()}."
            )
        device = torch.device(name if ranks == 1 else f"cuda:{rank}")
        facts = torch.cuda.get_device_properties(device)
        return Device(device, facts.name, facts.total_memory, None, GPU_STEP_TOKENS)
    if name != "cpu":
        raise DeviceError(f"device {name!r} is not one of auto, cpu, cuda.")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cap = CPU_POOL_CAP // ranks
    return Device(torch.device("cpu"), "cpu", total, cap, CPU_STEP_TOKENS, ranks)


def available_host_memory() -> int:
    """Bytes of main memory that could be allocated now, within a container's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    free = int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(min(free, left_in_container(CGROUP)))


def left_in_container(cgroup: Path) -> float:
    """Bytes up to the limit of the control group mounted there, of version 2 or 1; cached files
    that are not in use count as free. Infinite where there is no limit."""
    names = (
        (cgroup, "memory.max", "memory.current", "inactive_file"),
        (
            cgroup / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    )
    for folder, limit, used, cached in names:
        try:
            most = float((folder / limit).read_text().replace("max", "inf"))
            taken = int((folder / used).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        stat = dict(line.split(maxsplit=1) for line in lines)
        return max(most - taken + int(stat.get(cached, 0)), 0)
    return math.inf


DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
