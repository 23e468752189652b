"""The parts of a worker that only a GPU needs. Not run on one yet."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.config import DeviceConfig
from engine.errors import StartupError
from kernels.kv.format import KVFormat
from models.spec import ModelSpec
from worker.device import Device
from worker.executor import StreamExecutor
from worker.graphs import Buckets, Capture, CudaCapture, GraphRunner, StaticStep
from worker.kv_pool import allocate_pool
from worker.profiling import CudaMemory, DeviceMemory, largest_steps, peak_bytes, profile_pages
from worker.runner import EagerRunner, Runner
from worker.sampler import Sampler
from worker.sizing import MIB
from worker.slots import SlotTable
from worker.transfer import transfer_for
from worker.worker import Worker, WorkerFacts

log = logging.getLogger(__name__)

TELL_EVERY = 10  # graphs


def stream_executor(config: DeviceConfig, device: torch.device, threads: int) -> StreamExecutor:
    """Raises `StartupError` for a core that is not there."""
    core = config.worker_core
    if core is not None and core not in os.sched_getaffinity(0):
        cores = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
        raise StartupError(f"worker_core {core} is not one of this process's cores: {cores}.")
    return StreamExecutor(threads, device, core)


def measured_activations(
    runner: Runner,
    spec: ModelSpec,
    formats: Sequence[KVFormat],
    dtype: torch.dtype,
    slots: SlotTable,
    sampler: Sampler,
    *,
    step_tokens: int,
    drafts: int,
    max_model_len: int,
    memory: DeviceMemory | None = None,
) -> int:
    """Bytes that the largest steps take, measured by running them on a small pool.

    `slots` and `sampler` are those that will serve: every slot is given to a new owner before it is
    used again. memory: None for that of the GPU.
    """
    device, rows = slots.tokens.device, len(slots.epoch) - 1
    pages = profile_pages(step_tokens, slots.page_size)
    copies = 0 if slots.windows is None else slots.windows.count
    pool = allocate_pool(spec, pages, slots.page_size, dtype, device, formats, copies)
    facts = WorkerFacts(spec.vocab_size, max_model_len, pages, slots.page_size, "", "")
    executor = StreamExecutor(torch.get_num_threads(), device)
    transfer = transfer_for(device)
    worker = Worker(runner, pool, slots, sampler, executor, facts, transfer=transfer)
    steps = largest_steps(
        step_tokens=step_tokens,
        rows=rows,
        drafts=drafts,
        max_model_len=max_model_len,
        page_size=slots.page_size,
    )
    try:
        peak = peak_bytes(worker, steps, memory or CudaMemory(device))
    except torch.OutOfMemoryError as error:
        raise StartupError(
            f"the largest step, {step_tokens:,} tokens or {rows:,} sequences with {drafts} drafts "
            "each, does not fit beside the weights: lower --max-step-tokens, --max-num-seqs or "
            "--max-draft-tokens."
        ) from error
    finally:
        worker.close()
    del worker, pool
    if device.type == "cuda":
        torch.cuda.empty_cache()  # so that what is free is seen to be
    return peak


def graph_buckets(
    config: DeviceConfig, runner: Runner, rows: int, drafts: int, max_model_len: int, page_size: int
) -> Buckets | None:
    """The sizes of steps that will be recorded; None if none can or shall be."""
    if not config.cuda_graphs:
        return None
    if not can_be_recorded(runner):
        log.warning("no CUDA graphs: %s arithmetic of this model cannot be recorded", runner.name)
        return None
    return Buckets.of(rows, drafts, max_model_len, page_size)


def can_be_recorded(runner: Runner) -> bool:
    return isinstance(runner, EagerRunner) and runner.capturable


def recorded(
    runner: Runner,
    kv: Sequence[Tensor],
    spec: ModelSpec,
    dtype: torch.dtype,
    buckets: Buckets,
    page_size: int,
    capture: Capture | None = None,
    dense_pages: int = 0,
) -> GraphRunner:
    """The runner, its steps recorded when they first occur. capture: None for CUDA graphs;
    dense_pages: of the pool, where steps say which they are."""
    step = StaticStep(buckets, page_size, spec.hidden_size, dtype, kv[0].device, dense_pages)
    return GraphRunner(runner, kv, buckets, step, capture or CudaCapture())


def record_decoding(
    runner: GraphRunner, buckets: Buckets, rows: int, device: Device, allowed: int
) -> None:
    """Records at start-up what decoding without drafts needs. `allowed`: bytes, for the log."""
    wanted = list(buckets.decoding(rows))
    before = device.available_memory()

    def tell(done: int) -> None:
        if done % TELL_EVERY == 0 or done == len(wanted):
            log.info("recording CUDA graphs: %d of %d", done, len(wanted))

    runner.record(wanted, tell)
    log.info(
        "%d CUDA graphs take %.1f MiB; %.1f MiB are set aside for up to %d",
        *(len(wanted), (before - device.available_memory()) / MIB, allowed / MIB, buckets.count),
    )


Recording = Callable[[Runner, Sequence[Tensor], ModelSpec, torch.dtype], Runner]


def as_it_is(runner: Runner, kv: Sequence[Tensor], spec: ModelSpec, dtype: torch.dtype) -> Runner:
    """The `Recording` that records nothing."""
    return runner
