"""What only a GPU's worker has, put together on a CPU with stand-ins for the GPU's own part."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch

from engine.config import DeviceConfig
from engine.cuda import graph_buckets, measured_activations, recorded, stream_executor
from engine.errors import StartupError
from kernels.kv.format import DENSE
from kernels.ops import AttentionLayer
from kernels.torch_ops import TorchOps
from scheduler.request import SamplingParams
from tests.e2e.test_exactness import CONFIG, CPU, SPEC, VOCAB, decoder, layers, slot_table
from tests.worker.late import Again
from tests.worker.test_graphs import ragged
from worker.graphs import GraphRunner
from worker.kv_pool import allocate_pool
from worker.profiling import largest_steps, profile_pages
from worker.runner import EagerRunner
from worker.sampler import Sampler
from worker.sampling_state import SlotSampling
from worker.slots import SlotTable

ROWS, PAGE = 4, 8


class CapturableOps(TorchOps):
    def captures(self, layer: AttentionLayer) -> bool:
        return True


class Memory:
    """Counts up and remembers what was asked."""

    def __init__(self, base: int, peak: int) -> None:
        self.base, self.most, self.resets = base, peak, 0

    def reset_peak(self) -> None:
        self.resets += 1

    def allocated(self) -> int:
        return self.base

    def peak(self) -> int:
        assert self.resets == 1
        return self.most


class Noting(EagerRunner):
    """Remembers how many tokens and logits rows it was given."""

    def __init__(self) -> None:
        super().__init__(decoder(), TorchOps())
        self.tokens: list[int] = []
        self.read: list[int] = []

    def forward(self, ids, batch, kv, read=None):  # type: ignore[no-untyped-def]
        self.tokens.append(len(ids))
        assert int(batch.page_table.max()) < kv[0].shape[0]
        return super().forward(ids, batch, kv, read)

    def logits(self, hidden):  # type: ignore[no-untyped-def]
        self.read.append(len(hidden))
        return super().logits(hidden)


def measure(runner: EagerRunner, memory: Memory, max_model_len: int = 64) -> int:
    slots = SlotTable(ROWS + 1, max_model_len, PAGE, CPU)
    sampler = Sampler(SlotSampling(ROWS + 1, VOCAB, CPU), slots.tokens)
    found = measured_activations(
        runner,
        SPEC,
        [DENSE] * SPEC.num_layers,
        torch.float32,
        slots,
        sampler,
        step_tokens=100,
        drafts=3,
        max_model_len=max_model_len,
        memory=memory,
    )
    # The same slots and sampler serve afterwards.
    sampler.slots.admit(1, SamplingParams(max_tokens=1, temperature=0.0), 0, 1)
    assert sampler.slots.needs[1] == 0
    return found


def test_memory_is_the_peak_of_the_largest_steps_beyond_what_was_there() -> None:
    runner = Noting()
    assert measure(runner, Memory(1000, 5000)) == 4000
    assert measure(Noting(), Memory(5000, 1000)) == 0
    assert runner.tokens == [63, ROWS, ROWS * 4]  # one prompt of the most positions fits the step
    assert runner.read == [1, ROWS, ROWS * 4]


def test_dense_windows_have_their_pages_while_memory_is_measured() -> None:
    config = replace(CONFIG, max_num_seqs=ROWS, max_step_tokens=100)
    slots = slot_table(config, "k4v2h")
    sampler = Sampler(SlotSampling(ROWS + 1, VOCAB, CPU), slots.tokens)
    found = measured_activations(
        *(EagerRunner(decoder("k4v2h"), TorchOps()), SPEC, layers("k4v2h"), torch.float32),
        *(slots, sampler),
        step_tokens=100,
        drafts=3,
        max_model_len=64,
        memory=Memory(1000, 5000),
    )
    assert found == 4000


def test_a_largest_step_that_does_not_fit_is_one_clear_sentence() -> None:
    class Full(Noting):
        def logits(self, hidden):  # type: ignore[no-untyped-def]
            raise torch.OutOfMemoryError("1 PiB")

    with pytest.raises(StartupError, match=r"100 tokens or 4 sequences with 3 drafts each, does"):
        measure(Full(), Memory(0, 1))


@pytest.mark.parametrize(
    ("step_tokens", "rows", "drafts", "length"),
    [(100, 4, 3, 2000), (2048, 256, 8, 300), (64, 64, 8, 4096), (256, 2, 8, 5)],
)
def test_the_largest_steps_keep_to_all_limits(
    step_tokens: int, rows: int, drafts: int, length: int
) -> None:
    prompts, begin, verify = largest_steps(
        step_tokens=step_tokens, rows=rows, drafts=drafts, max_model_len=length, page_size=PAGE
    )
    chunks = [len(row.chunk or ()) for row in prompts.rows]
    assert len(chunks) <= rows
    assert sum(chunks) <= step_tokens
    assert max(chunks) < length
    assert sum(1 + row.drafts for row in verify.rows) <= max(step_tokens, rows)
    for row in (*prompts.rows, *begin.rows):
        assert all(0 < page < profile_pages(step_tokens, PAGE) for page in row.new_pages)
    for row, begun in zip(verify.rows, begin.rows, strict=True):
        assert 2 + row.drafts <= min(len(begun.new_pages) * PAGE, length)


def test_graphs_are_for_what_can_be_recorded() -> None:
    eager, able = EagerRunner(decoder(), TorchOps()), EagerRunner(decoder(), CapturableOps())
    on, off = DeviceConfig(), DeviceConfig(cuda_graphs=False)
    assert graph_buckets(on, eager, 8, 0, 256, PAGE) is None
    assert graph_buckets(off, able, 8, 0, 256, PAGE) is None
    assert graph_buckets(on, able, 8, 0, 256, PAGE) is not None
    assert not able.coarse().name.startswith("CUDA")


def test_a_recorded_runner_computes_what_the_runner_does() -> None:
    able = EagerRunner(decoder(), CapturableOps())
    buckets = graph_buckets(DeviceConfig(), able, 8, 2, 80, 4)
    assert buckets is not None
    kv = allocate_pool(SPEC, 300, 4, torch.float32, CPU)
    runner = recorded(able, kv, SPEC, torch.float32, buckets, 4, Again())
    assert isinstance(runner, GraphRunner)
    ids, batch = ragged(random.Random(0), [1, 3, 2])
    other = [layer.clone() for layer in kv]
    with torch.inference_mode():
        wanted = EagerRunner(decoder(), TorchOps()).forward(ids, batch, other)
        assert torch.equal(runner.forward(ids, batch, kv), wanted)


def test_the_feeding_thread_is_pinned_and_no_other() -> None:
    before = os.sched_getaffinity(0)
    core = max(before)
    executor = stream_executor(DeviceConfig(worker_core=core), CPU, 1)
    seen: list[set[int]] = []
    executor.call(lambda: seen.append(os.sched_getaffinity(0)))
    executor.close()
    assert seen == [{core}]
    assert os.sched_getaffinity(0) == before


def test_a_core_that_is_not_there_is_one_clear_sentence() -> None:
    with pytest.raises(StartupError, match=r"worker_core 9999 is not one of this process's cores"):
        stream_executor(DeviceConfig(worker_core=9999), CPU, 1)
