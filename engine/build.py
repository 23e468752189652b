"""From the configuration to a worker that is ready to run: the one place that chooses the parts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch

from engine.config import DeviceConfig, EngineConfig
from engine.errors import StartupError
from kernels.cpu.build import BuildError, start_build
from kernels.linear.prepare import LinearMode, prepare_linears
from kernels.ops import Ops
from kernels.torch_ops import TorchOps
from models.decoder import Decoder
from models.errors import CheckpointError
from models.loader import load_decoder, read_spec
from models.spec import ModelSpec
from models.weights import resolve_checkpoint
from scheduler.prefix import chain_root
from scheduler.request import SchedulerConfig
from worker.device import DTYPES, Device, DeviceError, resolve_device
from worker.executor import ThreadExecutor
from worker.kv_pool import allocate_pool, page_bytes
from worker.runner import EagerRunner
from worker.sampler import Sampler
from worker.sampling_state import SlotSampling
from worker.sizing import Budget, BudgetError, activation_bytes, plan_budget
from worker.slots import SlotTable
from worker.worker import Worker, WorkerFacts

log = logging.getLogger(__name__)


def build_worker(
    config: EngineConfig, progress: Callable[[str], None]
) -> tuple[Worker, SchedulerConfig]:
    """Loads the model, sizes the KV pool and starts the background build of native kernels.

    Raises `StartupError`, one sentence for a person, for whatever the user can mend.
    """
    try:
        return _build(config, progress)
    except (CheckpointError, BudgetError, DeviceError) as error:
        raise StartupError(str(error)) from error


def _build(config: EngineConfig, progress: Callable[[str], None]) -> tuple[Worker, SchedulerConfig]:
    device = resolve_device(config.device.device)
    threads = config.device.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    progress("imports")

    folder = resolve_checkpoint(config.model.model, config.model.revision)
    spec = read_spec(folder)
    max_model_len = _max_model_len(config, spec)
    name = config.model.dtype
    dtype = DTYPES[name] if name != "auto" else device.default_dtype(DTYPES[spec.dtype])
    before = device.available_memory()
    decoder = load_decoder(
        folder,
        dtype=dtype,
        device=device.torch_device,
        max_model_len=max_model_len,
        load_format=config.model.load_format,
        progress=log.debug,
    )
    prepare_linears(decoder, _linear_mode(config.device, device))
    progress("weights")

    budget = _budget(config, device, decoder, dtype, max_model_len, before)
    log.info("%s", budget)
    kv = allocate_pool(spec, budget.num_pages, budget.page_size, dtype, device.torch_device)
    num_slots = config.schedule.max_num_seqs + 1
    slots = SlotTable(num_slots, max_model_len, budget.page_size, device.torch_device)
    sampling = SlotSampling(num_slots, spec.vocab_size, device.torch_device)
    worker = Worker(
        EagerRunner(decoder, TorchOps()),
        kv,
        slots,
        Sampler(sampling, slots.tokens),
        ThreadExecutor(threads),
        WorkerFacts(
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            num_pages=budget.num_pages,
            page_size=budget.page_size,
            device=device.name,
            dtype=str(dtype).removeprefix("torch."),
        ),
    )
    _use_native_kernels(config.device, device, worker, decoder)
    progress("KV pool")
    return worker, SchedulerConfig(
        num_pages=budget.num_pages,
        page_size=budget.page_size,
        max_num_seqs=config.schedule.max_num_seqs,
        max_step_tokens=config.schedule.max_step_tokens,
        max_model_len=max_model_len,
        enable_prefix_cache=config.cache.enable_prefix_cache,
        hash_root=chain_root(str(folder.resolve()).encode(), str(dtype).encode()),
        max_queued_requests=config.schedule.max_queued_requests,
    )


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    asked = config.model.max_model_len
    if asked is None:
        return spec.max_position
    if not 1 < asked <= spec.max_position:
        raise StartupError(
            f"max_model_len {asked:,} is not between 2 and the checkpoint's context of "
            f"{spec.max_position:,} tokens."
        )
    return asked


def _linear_mode(config: DeviceConfig, device: Device) -> LinearMode:
    if config.deterministic:
        return LinearMode.INVARIANT
    return LinearMode.PACKED if device.torch_device.type == "cpu" else LinearMode.DENSE


def _budget(
    config: EngineConfig,
    device: Device,
    decoder: Decoder,
    dtype: torch.dtype,
    max_model_len: int,
    before: int,
) -> Budget:
    spec, cache = decoder.spec, config.cache
    available = device.available_memory()
    return plan_budget(
        total=device.total_memory,
        available=available,
        fraction=cache.memory_fraction,
        weights=max(before - available, 0),
        activations=activation_bytes(
            max_step_tokens=config.schedule.max_step_tokens,
            max_sample_rows=config.schedule.max_num_seqs,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            attention_size=(spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim,
            vocab_size=spec.vocab_size,
            dtype_bytes=dtype.itemsize,
        ),
        page_bytes=page_bytes(spec, cache.page_size, dtype),
        page_size=cache.page_size,
        max_model_len=max_model_len,
        max_num_seqs=config.schedule.max_num_seqs,
        default_cap=device.pool_cap,
        kv_bytes=cache.kv_bytes,
        num_pages=cache.num_pages,
    )


def _use_native_kernels(
    config: DeviceConfig, device: Device, worker: Worker, decoder: Decoder
) -> None:
    """Swaps native kernels in once they are built; the server does not wait for them.

    A deterministic server does wait: its text must not depend on when a build was done.
    """
    if device.torch_device.type != "cpu" or not config.compile:
        return
    started = time.monotonic()

    def swap(built: Future[Ops]) -> None:
        try:
            worker.use(EagerRunner(decoder, built.result()))
        except BuildError as error:
            log.warning("serving with plain torch operations, which are slower: %s", error)
            return
        log.info("native CPU kernels in use after %.1f s", time.monotonic() - started)

    future = start_build(Path(config.cache_dir) if config.cache_dir else None)
    if config.deterministic:
        swap(future)
    else:
        future.add_done_callback(swap)
