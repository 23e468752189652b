"""From the configuration to a worker that is ready to run: the one place that chooses the parts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.arithmetic import (
    eager_runner,
    native_readers,
    native_runner_of,
    start_native_build,
    swap_when_built,
    use_native_draw,
)
from engine.backends import choose_backend
from engine.config import EngineConfig
from engine.cuda import (
    as_it_is,
    graph_buckets,
    measured_activations,
    record_decoding,
    recorded,
    stream_executor,
)
from engine.drafters import Draft, build_drafting, load_draft
from engine.errors import StartupError
from engine.ranks import Ranks
from engine.scheduling import drafter_names
from engine.sizes import (
    activations_of,
    budget_of,
    calibration_of,
    context_of,
    dense_pages_of,
    dtype_of,
    formats_of,
    step_tokens,
    use_formats,
)
from kernels.cpu.ops import NativeOps
from kernels.kv.format import windows_of
from kernels.linear.prepare import isolate_rows
from kernels.linear.quantized import is_quantized, parameter_count, weight_bytes
from models.decoder import Decoder
from models.errors import CheckpointError
from models.loader import load_model, read_spec
from models.parallel import ALONE, Shard
from models.weights import resolve_checkpoint
from scheduler.prefix import chain_root
from scheduler.request import SchedulerConfig
from worker.device import DeviceError, resolve_device
from worker.executor import Executor, ThreadExecutor
from worker.graphs import Buckets, graph_bytes
from worker.kv_pool import allocate_host_pool, allocate_pool, page_bytes, populate, window_bytes
from worker.ranks import LeadingRunner
from worker.runner import Runner
from worker.sampler import Sampler
from worker.sampling_state import SlotSampling
from worker.sizing import BudgetError
from worker.slots import SlotTable
from worker.transfer import transfer_for
from worker.window_pages import WindowPages
from worker.worker import Worker, WorkerFacts

if TYPE_CHECKING:
    from models.transformers_fallback import TransformersDecoder

log = logging.getLogger(__name__)

# Kernels compiled by an earlier start are found in less; compiling them takes several seconds.
LOOKUP_SECONDS = 0.4

# Latest positions of each sequence that keep all of their bits: much attention falls on them. With
# none the words of the bundled model move three times as far, with 256 a tenth to a fifth less far
# than with 64 (docs/benchmarks/kv.md).
NEVER_DEMOTED = 64


def build_worker(
    config: EngineConfig, progress: Callable[[str], None], *, patient: bool = False
) -> tuple[Worker, SchedulerConfig]:
    """Loads the model, sizes the KV pool and starts the background build of native kernels.

    With `patient` that build is waited for, so that the worker is from the start what it will be.

    Raises `StartupError`, one sentence for a person, for whatever the user can mend.
    """
    try:
        with ExitStack() as undo:
            built = _build(config, progress, patient, undo)
            undo.pop_all()
            return built
    except (CheckpointError, BudgetError, DeviceError) as error:
        raise StartupError(str(error)) from error


def _build(
    config: EngineConfig, progress: Callable[[str], None], patient: bool, undo: ExitStack
) -> tuple[Worker, SchedulerConfig]:
    """`undo`: for a start that fails."""
    shard = Shard(0, config.device.tensor_parallel_size)
    device = resolve_device(config.device.device, ranks=shard.size)
    threads = max((config.device.threads or torch.get_num_threads()) // shard.size, 1)
    torch.set_num_threads(threads)
    backend = choose_backend(config.device, device, config.cache.page_size)
    native = start_native_build(config.device, device) if backend.native else None
    progress("imports")

    folder = resolve_checkpoint(config.model.model, config.model.revision)
    whole = read_spec(folder)
    spec = shard.spec(whole)
    max_model_len = context_of(config, spec)
    dtype = dtype_of(config, device, spec)
    calibration = calibration_of(config, whole, shard)
    formats = formats_of(config, whole, shard, calibration)
    ranks = _start_ranks(config, folder, threads, undo) if shard.size > 1 else None
    collective = ALONE if ranks is None else ranks.join(device)

    load = partial(
        load_model,
        folder,
        dtype=dtype,
        device=device.torch_device,
        max_model_len=max_model_len,
        load_format=config.model.load_format,
        quantization=config.model.quantization,
        progress=log.debug,
        collective=collective,
    )

    def load_formatted() -> Decoder | TransformersDecoder:
        loaded = load()
        use_formats(loaded, formats, calibration)
        if config.device.deterministic:
            isolate_rows(loaded)
        return loaded

    load_small = load_draft(config, folder, dtype, device, max_model_len)
    before = device.available_memory()
    model = load_formatted()
    draft = None if load_small is None else load_small()
    weights, size = weight_bytes(model), parameter_count(model)
    if device.torch_device.type == "cpu" and is_quantized(model):
        log.info(
            "quantized weights are unpacked by plain torch operations on a CPU: they take less "
            "memory there, and more time"
        )
    # The eager model and the native one live side by side until the last stream of the former has
    # ended; where there is no room for both, and where text must not depend on when a build was
    # done, the build is waited for.
    wait = patient or config.device.deterministic or 2 * weights > device.available_memory()
    patience = None if wait else LOOKUP_SECONDS
    readers = native_readers(native, formats, shard.size)
    runner = native_runner_of(model, readers, patience)
    runner = runner or eager_runner(model, dtype, config, backend)
    if ranks is not None:
        runner = LeadingRunner(runner, ranks, collective)
    small: Draft | None = None
    if draft is not None:
        parameters = parameter_count(draft)
        arithmetic = native_runner_of(draft, native, patience)
        arithmetic = arithmetic or eager_runner(draft, dtype, config, backend)
        small = Draft(arithmetic, draft.spec, dtype, parameters)
    progress(f"weights, {runner.name} arithmetic")

    page = page_bytes(spec, config.cache.page_size, dtype, formats)
    if small is not None:  # a page of the target's has one of the draft model's beside it
        page += page_bytes(small.spec, config.cache.page_size, dtype)
    num_slots, page_size = config.schedule.max_num_seqs + 1, config.cache.page_size
    windows, copies = windows_of(formats), dense_pages_of(config, device, formats)
    near: WindowPages | None = None
    if windows is not None:
        most = -(-max_model_len // page_size)
        near = WindowPages(windows, copies, num_slots, most, page_size, device.torch_device)
    slots = SlotTable(num_slots, max_model_len, page_size, device.torch_device, near)
    sampling = SlotSampling(num_slots, spec.vocab_size, device.torch_device)
    sampler = Sampler(sampling, slots.tokens)
    executor: Executor
    buckets: Buckets | None = None
    drafts = config.speculation.max_draft_tokens
    if device.torch_device.type == "cuda":
        executor = stream_executor(config.device, device.torch_device, threads)
        if ranks is None:
            activations = measured_activations(
                runner,
                spec,
                formats,
                dtype,
                slots,
                sampler,
                step_tokens=step_tokens(config, device),
                drafts=drafts,
                max_model_len=max_model_len,
            )
        else:  # the other ranks have no pools yet to compute on
            activations = activations_of(config, spec, dtype, device)
        verified = drafts if drafter_names(config.speculation) else 0
        buckets = graph_buckets(
            config.device, runner, num_slots - 1, verified, max_model_len, page_size
        )
        progress("memory of the largest step")
    else:
        if config.device.worker_core is not None:
            raise StartupError("worker_core is about the thread that feeds a GPU; there is none.")
        executor = ThreadExecutor(threads)
        activations = activations_of(config, spec, dtype, device)
    graphs = 0
    if buckets is not None:
        forward = activations_of(config, spec, dtype, device, buckets.tokens[-1])
        models = [spec] if small is None else [spec, small.spec]
        graphs = sum(
            graph_bytes(
                buckets, forward, m.hidden_size, dtype.itemsize, windows=windows is not None
            )
            for m in models
        )
    dense = window_bytes(spec, copies, page_size, dtype, formats)
    budget = budget_of(config, device, page, dense, max_model_len, before, activations, graphs)
    if ranks is not None:
        pages, host_pages = ranks.allocate(budget.num_pages, budget.host_pages)
        limit = budget.limit if pages == budget.num_pages else "another rank's memory"
        budget = replace(budget, num_pages=pages, host_pages=host_pages, limit=limit)
        log.info("%d ranks; the budget is that of rank 0, its part of weights and KV", shard.size)
    log.info("%s", budget)
    kv = allocate_pool(
        spec, budget.num_pages, page_size, dtype, device.torch_device, formats, copies
    )
    # One more: page 0 is as little used as on the device.
    host = allocate_host_pool(kv, budget.host_pages + 1) if budget.host_pages else []
    if backend.draw is not None:
        sampler.use(backend.draw)
    record = as_it_is
    if buckets is not None:
        record = partial(recorded, buckets=buckets, page_size=page_size)
        graphed = recorded(runner, kv, spec, dtype, buckets, page_size, dense_pages=copies)
        record_decoding(graphed, buckets, num_slots - 1, device, graphs)
        runner = graphed
        progress("CUDA graphs")
    drafting = build_drafting(
        config.speculation,
        slots,
        sampler,
        small,
        Draft(runner, spec, dtype, size),
        kv,
        budget.num_pages,
        step_tokens(config, device),
        record,
    )
    worker = Worker(
        runner,
        kv,
        slots,
        sampler,
        executor,
        WorkerFacts(
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            num_pages=budget.num_pages,
            page_size=budget.page_size,
            device=device.name if shard.size == 1 else f"{shard.size} × {device.name}",
            dtype=str(dtype).removeprefix("torch."),
            drafters=drafter_names(config.speculation),
            arithmetic=runner.name,
            beside=0.0 if drafting is None else drafting.slowdown,
        ),
        host,
        drafting,
        transfer_for(device.torch_device),
        ranks,
    )
    drafter = None if drafting is None else drafting.model

    def use_runner(built: Runner) -> None:
        worker.use(built)
        if drafter and drafter.coarse:
            worker.call(lambda: drafter.use(built.coarse()))

    if readers is not None and isinstance(model, Decoder) and runner.name != NativeOps.name:
        swap_when_built(readers, load_formatted, use_runner)
    if native is not None:
        if drafter and load_small and drafter.runner.name != NativeOps.name:
            use = drafter.use
            swap_when_built(native, load_small, lambda r: worker.call(lambda: use(r)))
        # Every form of the draw gives the same tokens, so this one needs no care about streams.
        native.add_done_callback(lambda built: use_native_draw(worker, built))
    populate(kv)
    progress("KV pool")
    return worker, SchedulerConfig(
        num_pages=budget.num_pages,
        page_size=budget.page_size,
        max_num_seqs=config.schedule.max_num_seqs,
        max_step_tokens=step_tokens(config, device),
        max_model_len=max_model_len,
        enable_prefix_cache=config.cache.enable_prefix_cache,
        prefix_block=0 if windows is None else windows.block,
        demote_all_but=NEVER_DEMOTED if config.cache.kv_demote else None,
        host_pages=budget.host_pages,
        hash_root=chain_root(
            str(folder.resolve()).encode(),
            str(dtype).encode(),
            config.model.quantization.encode(),
            "/".join(form.name for form in formats).encode(),
            b"" if calibration is None else calibration.dump().encode(),
        ),
        max_queued_requests=config.schedule.max_queued_requests,
        max_queued_tokens=config.schedule.max_queued_tokens,
        ttft_target=config.schedule.ttft_target,
        mtpot_target=config.schedule.mtpot_target,
    )


def _start_ranks(config: EngineConfig, folder: Path, threads: int, undo: ExitStack) -> Ranks:
    """The other ranks, which load while this one does. What is downloaded is so by now."""
    ranks = Ranks(replace(config, model=replace(config.model, model=str(folder))), threads)
    undo.callback(ranks.close)
    return ranks
