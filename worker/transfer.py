"""`Transfer`: the small copies between host and device that every step makes, and its clock.

On a CPU there is nothing to copy. On CUDA nothing here waits for the device while steps follow each
other: what is sent goes through page-locked buffers that take turns, what is fetched arrives in
page-locked memory, and `Span` tells when it has. Not run on a GPU yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

# A step sends twice at most, and two steps are under way at a time.
BUFFERS = 4
FIRST_CAPACITY = 1 << 14  # numbers
_NOTHING = torch.empty(0, dtype=torch.int64)


class Span(Protocol):
    """One step, on the clock of the device."""

    def end(self) -> None:
        """All of the step's work has been given to the device."""
        ...

    def wait(self) -> None:
        """Blocks until the device is through with it. From any thread, after `end`."""
        ...

    def seconds(self) -> float:
        """From the step's beginning, or the end of the one before it, to its last result; after
        `wait`."""
        ...


class Transfer(Protocol):
    """One per worker, used on its thread alone."""

    def begin(self) -> Span:
        """A step begins."""
        ...

    def send(self, *parts: Sequence[int]) -> list[Tensor]:
        """Each part as a 1-D int64 tensor on the device; together they are one copy."""
        ...

    def fetch(self, tensor: Tensor) -> Tensor:
        """The tensor in host memory: to be read once the step's span was waited for."""
        ...


class HostSpan:
    """A step on the thread that computes it."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def end(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def seconds(self) -> float:
        return time.perf_counter() - self._started


class HostTransfer:
    """Where the device's memory is the host's."""

    def begin(self) -> Span:
        return HostSpan()

    def send(self, *parts: Sequence[int]) -> list[Tensor]:
        return [torch.tensor(part, dtype=torch.int64) if part else _NOTHING for part in parts]

    def fetch(self, tensor: Tensor) -> Tensor:
        return tensor


class Copied(Protocol):
    """Tells when a copy is over; `torch.cuda.Event` is one."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Staging:
    """Page-locked buffers that take turns, so that one is filled while others are being copied."""

    def __init__(
        self, device: torch.device, event: Callable[[], Copied], buffers: int = BUFFERS
    ) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._buffers = [self._allocate(FIRST_CAPACITY) for _ in range(buffers)]
        self._copied = [event() for _ in range(buffers)]
        self._turn = 0

    def _allocate(self, capacity: int) -> Tensor:
        return torch.empty(capacity, dtype=torch.int64, pin_memory=self._pinned)

    def send(self, *parts: Sequence[int]) -> list[Tensor]:
        """See `Transfer.send`."""
        counts = [len(part) for part in parts]
        total = sum(counts)
        turn = self._turn
        self._turn = (turn + 1) % len(self._buffers)
        # Over long since, unless more is sent than steps are waited for. An event that was never
        # recorded is over too.
        self._copied[turn].synchronize()
        if self._buffers[turn].shape[0] < total:
            self._buffers[turn] = self._allocate(2 * total)
        buffer = self._buffers[turn][:total]
        numbers, at = buffer.numpy(), 0
        for part, count in zip(parts, counts, strict=True):
            numbers[at : at + count] = part
            at += count
        sent = torch.empty(total, dtype=torch.int64, device=self._device)
        sent.copy_(buffer, non_blocking=True)
        self._copied[turn].record()
        return list(sent.split(counts))


class CudaSpan:
    """A step between two events of the stream."""

    def __init__(self) -> None:
        self._start = torch.cuda.Event(enable_timing=True)
        # Blocking: the thread that waits sleeps, and leaves the interpreter to the others.
        self._end = torch.cuda.Event(enable_timing=True, blocking=True)
        self._start.record()

    def end(self) -> None:
        self._end.record()

    def wait(self) -> None:
        self._end.synchronize()

    def seconds(self) -> float:
        return self._start.elapsed_time(self._end) / 1e3


class CudaTransfer:
    """For steps that are launched one after another on the device's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._staging = Staging(device, torch.cuda.Event)

    def begin(self) -> Span:
        return CudaSpan()

    def send(self, *parts: Sequence[int]) -> list[Tensor]:
        return self._staging.send(*parts)

    def fetch(self, tensor: Tensor) -> Tensor:
        # The allocator of page-locked memory gives a block out again once its copy is over.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


def transfer_for(device: torch.device) -> Transfer:
    return CudaTransfer(device) if device.type == "cuda" else HostTransfer()
