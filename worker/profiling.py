"""What the largest steps take of a device's memory, found out by running them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from scheduler.plan import Admit, Row, StepPlan
from scheduler.request import SamplingParams
from worker.worker import Worker

# Everything a sampler may have to do that takes memory for each row and token of the vocabulary.
DEMANDING = SamplingParams(
    max_tokens=1 << 20, temperature=1.0, top_p=0.9, repetition_penalty=1.1, logprobs=1
)


class DeviceMemory(Protocol):
    """Bytes that tensors take on the device."""

    def reset_peak(self) -> None:
        """The peak is from now on."""
        ...

    def allocated(self) -> int: ...

    def peak(self) -> int: ...


class CudaMemory:
    """By the counters of torch's allocator. Not run on a GPU yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset_peak(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)


def profile_pages(step_tokens: int, page_size: int) -> int:
    """Pages of the pool that `largest_steps` write to, the null page included."""
    return -(-step_tokens // page_size) + 1


def largest_steps(
    *, step_tokens: int, rows: int, drafts: int, max_model_len: int, page_size: int
) -> list[StepPlan]:
    """A step of prompts alone, and one of rows with all the drafts they may have.

    Token ids are zeros. Pages are shared by the rows, as what they hold does not matter.
    """
    pages = tuple(range(1, profile_pages(step_tokens, page_size)))

    def admits(count: int, length: int) -> tuple[Admit, ...]:
        return tuple(Admit(slot, 0, DEMANDING, 0, length, (), ()) for slot in range(1, count + 1))

    def pages_for(length: int) -> tuple[int, ...]:
        return tuple(pages[i % len(pages)] for i in range(-(-length // page_size)))

    longest = min(step_tokens, max_model_len - 1)
    lengths = [longest] * (step_tokens // longest)
    lengths = lengths[:rows] or [longest]
    prompts = [
        Row(slot, 0, (0,) * length, True, new_pages=pages_for(length))
        for slot, length in enumerate(lengths, 1)
    ]
    drafts = min(drafts, max(step_tokens // rows - 1, 0), max_model_len - 2)
    begin = [
        Row(slot, 0, (0,), True, new_pages=pages_for(2 + drafts)) for slot in range(1, rows + 1)
    ]
    verify = [Row(slot, 0, None, True, drafts) for slot in range(1, rows + 1)]
    return [
        StepPlan(1, admits(len(lengths), longest), tuple(prompts)),
        StepPlan(2, admits(rows, 1), tuple(begin)),
        StepPlan(3, (), tuple(verify)),
    ]


def peak_bytes(worker: Worker, steps: Sequence[StepPlan], memory: DeviceMemory) -> int:
    """The most that any of these steps takes beyond what is there between them."""
    before = memory.allocated()
    memory.reset_peak()
    for step in steps:
        worker.launch(step).wait()
    return max(memory.peak() - before, 0)
