"""The GPU's way of running steps, on a CPU: begun before earlier ones are read, and recorded.

What is fetched from the device is garbage until it was waited for, recordings are closures over the
static buffers, and the text must be that of decoding each request alone.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from kernels.torch_ops import TorchOps
from scheduler.admission import make_policy
from scheduler.plan import StepPlan
from scheduler.request import SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.speculation import FixedDrafts
from tests.e2e.driving import drive
from tests.e2e.test_exactness import (
    CONFIG,
    CONTEXT,
    CPU,
    SPEC,
    VOCAB,
    decoder,
    layers,
    requests,
    same,
    slot_table,
    windowed,
)
from tests.worker.late import Again, LateTransfer
from worker.drafters.suffix import SuffixDrafter
from worker.drafting import Drafting
from worker.executor import StreamExecutor
from worker.graphs import Buckets, GraphRunner, StaticStep
from worker.kv_pool import allocate_host_pool, allocate_pool
from worker.runner import EagerRunner
from worker.sampler import Sampler
from worker.sampling_state import SlotSampling
from worker.worker import BegunStep, Worker, WorkerFacts


def late_worker(
    config: SchedulerConfig, drafts: int = 0, kv_format: str = "auto"
) -> tuple[Worker, LateTransfer, Again]:
    """Recorded decode and verification steps, a transfer that is late; a drafter if it drafts."""
    size, slots, formats = config.page_size, slot_table(config, kv_format), layers(kv_format)
    copies = 0 if slots.windows is None else slots.windows.count
    kv = allocate_pool(SPEC, config.num_pages, size, torch.float32, CPU, formats, copies)
    eager = EagerRunner(decoder(kv_format), TorchOps())
    buckets = Buckets.of(config.max_num_seqs, drafts, CONTEXT, config.page_size)
    capture, transfer = Again(), LateTransfer()
    step = StaticStep(buckets, config.page_size, SPEC.hidden_size, torch.float32, CPU, copies)
    worker = Worker(
        GraphRunner(eager, kv, buckets, step, capture),
        kv,
        slots,
        Sampler(SlotSampling(config.max_num_seqs + 1, VOCAB, CPU), slots.tokens),
        StreamExecutor(1),
        WorkerFacts(VOCAB, CONTEXT, config.num_pages, config.page_size, "cpu", "float32"),
        allocate_host_pool(kv, config.host_pages + 1),
        Drafting(slots, [SuffixDrafter()]) if drafts else None,
        transfer,
    )
    return worker, transfer, capture


@pytest.mark.parametrize("sampler", ["greedy", "temperature", "penalties"])
@pytest.mark.parametrize("depth", [1, 2])
def test_plain_decoding(sampler: str, depth: int) -> None:
    worker, transfer, capture = late_worker(CONFIG)
    found = drive(Scheduler(CONFIG), worker, requests(sampler), depth=depth, arrivals_per_step=2)
    worker.close()
    same(found, sampler)
    assert capture.replayed > 50
    assert transfer.sent == len(transfer.spans)  # one upload a step


@pytest.mark.parametrize("depth", [1, 2])
def test_drafts_wait_for_what_they_need_to_know(depth: int) -> None:
    scheduler, (worker, _, capture) = Scheduler(CONFIG, FixedDrafts(3)), late_worker(CONFIG, 3)
    found = drive(scheduler, worker, requests("greedy"), depth=depth, arrivals_per_step=2)
    worker.close()
    same(found, "greedy")
    assert scheduler.load().draft_tokens > 0
    assert capture.replayed > 20


def test_drafts_that_stand_on_the_device_wait_for_nothing() -> None:
    """Without a drafter rows verify leftovers of the token table, whose fate the host learns late:
    bounds of lengths are then too high by the rejected drafts."""
    worker, _, _ = late_worker(CONFIG)
    found = drive(Scheduler(CONFIG, FixedDrafts(3)), worker, requests("temperature"), depth=2)
    worker.close()
    same(found, "temperature")


@pytest.mark.parametrize("drafter", [False, True])
@pytest.mark.parametrize("pages", [34])
@pytest.mark.parametrize("kv_format", ["int2h", "oscar2"])
def test_dense_windows_wait_for_exact_lengths(kv_format: str, pages: int, drafter: bool) -> None:
    config = windowed(replace(CONFIG, num_pages=pages, max_step_tokens=64), kv_format)
    crowded = make_policy("aggressive", watermark=0.0)
    scheduler = Scheduler(config, FixedDrafts(3), crowded)
    worker, _, capture = late_worker(config, 3 if drafter else 0, kv_format)
    found = drive(scheduler, worker, requests("temperature"), depth=2, arrivals_per_step=2)
    worker.close()
    same(found, "temperature", kv_format)
    assert (capture.replayed > 20) == drafter  # else buckets are of single tokens
    load = scheduler.load()
    assert load.draft_tokens > 0
    assert (load.preemptions > 0) == (pages == 34)
    windows = worker._slots.windows
    assert windows is not None
    for slot in range(len(worker._slots.epoch)):
        windows.clear(slot)
    assert windows.free == windows.count - 1, "every page has been given back"


@pytest.mark.parametrize("host_pages", [0, 60])
def test_preemption_and_swapping(host_pages: int) -> None:
    config = replace(CONFIG, num_pages=34, max_step_tokens=64, host_pages=host_pages)
    crowded = make_policy("aggressive", watermark=0.0)
    scheduler, (worker, _, _) = Scheduler(config, policy=crowded), late_worker(config)
    found = drive(scheduler, worker, requests("temperature"))
    worker.close()
    same(found, "temperature")
    load = scheduler.load()
    assert load.pages_swapped_in > 0 if host_pages else load.preemptions > 0


def test_a_step_begins_while_the_one_before_it_is_computed() -> None:
    """The device is held up in step 1 until step 2 has begun: reading first would hang."""
    worker, transfer, _ = late_worker(CONFIG)
    begun, begin = threading.Event(), worker._begin

    def noting(plan: StepPlan) -> BegunStep:
        step = begin(plan)
        if len(transfer.spans) == 1:
            wait = step.span.wait
            transfer.spans[0].wait = lambda: (begun.wait(20), wait())  # type: ignore[method-assign]
        else:
            begun.set()
        return step

    worker._begin = noting  # type: ignore[method-assign]
    found = drive(Scheduler(CONFIG), worker, requests("greedy")[:2])
    worker.close()
    assert begun.is_set()
    assert all(result.finish is not None for result in found.values())


@pytest.mark.parametrize("stage", ["begin", "wait", "read"])
def test_a_fault_reaches_whoever_waits(stage: str) -> None:
    class Faulty:
        def wait(self) -> None:
            if stage == "wait":
                raise RuntimeError(stage)

        def read(self) -> None:
            raise RuntimeError(stage)

    def begin() -> Faulty:
        if stage == "begin":
            raise RuntimeError(stage)
        return Faulty()

    executor = StreamExecutor(1)
    with pytest.raises(RuntimeError, match=stage):
        executor.submit(begin).wait()  # type: ignore[arg-type]
    executor.close()
