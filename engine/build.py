"""From the configuration to a worker that is ready to run: the one place that chooses the parts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.backends import Backend, choose_backend
from engine.config import DeviceConfig, EngineConfig
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
from kernels.cpu.build import BuildError, start_build
from kernels.cpu.ops import NativeOps
from kernels.cpu.packed import native_format
from kernels.kv.calibration import Calibration
from kernels.kv.format import KVFormat, windows_of
from kernels.kv.presets import HALVES, layer_formats
from kernels.linear.prepare import LinearMode, isolate_rows, prepare_linears
from kernels.linear.quantized import is_quantized, parameter_count, weight_bytes
from models.decoder import Decoder
from models.errors import CheckpointError
from models.loader import load_model, read_spec
from models.model import LanguageModel
from models.parallel import ALONE, Shard
from models.spec import ModelSpec
from models.weights import resolve_checkpoint
from scheduler.prefix import chain_root
from scheduler.request import SchedulerConfig
from worker.device import DTYPES, Device, DeviceError, available_host_memory, resolve_device
from worker.drafters.registry import COARSE
from worker.executor import Executor, ThreadExecutor
from worker.graphs import Buckets, graph_bytes
from worker.kv_pool import allocate_host_pool, allocate_pool, page_bytes, window_bytes
from worker.native import native_runner
from worker.ranks import LeadingRunner
from worker.runner import EagerRunner, Runner
from worker.sampler import Sampler
from worker.sampling_state import SlotSampling
from worker.sizing import MIB, Budget, BudgetError, activation_bytes, plan_budget
from worker.slots import SlotTable
from worker.transfer import transfer_for
from worker.window_pages import WindowPages, dense_page_count
from worker.worker import Worker, WorkerFacts

if TYPE_CHECKING:
    from models.transformers_fallback import TransformersDecoder

log = logging.getLogger(__name__)

# Kernels compiled by an earlier start are found in less; compiling them takes several seconds.
LOOKUP_SECONDS = 1.0


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
    native = _start_native_build(config.device, device) if backend.native else None
    progress("imports")

    folder = resolve_checkpoint(config.model.model, config.model.revision)
    whole = read_spec(folder)
    spec = shard.spec(whole)
    max_model_len = context_of(config, spec)
    dtype = dtype_of(config, device, spec)
    formats = formats_of(config, whole, shard)
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
        loaded.use_formats(formats)
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
    readers = _readers(native, formats, shard.size)
    runner = _native_runner(model, readers, patience)
    runner = runner or eager_runner(model, dtype, config, backend)
    if ranks is not None:
        runner = LeadingRunner(runner, ranks, collective)
    small: Draft | None = None
    if draft is not None:
        parameters = parameter_count(draft)
        arithmetic = _native_runner(draft, native, patience)
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
                step_tokens=_step_tokens(config, device),
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
        graphs = sum(graph_bytes(buckets, forward, m.hidden_size, dtype.itemsize) for m in models)
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
        graphed = recorded(runner, kv, spec, dtype, buckets, page_size)
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
        _step_tokens(config, device),
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
        _swap_when_built(readers, load_formatted, use_runner)
    if native is not None:
        if drafter and load_small and drafter.runner.name != NativeOps.name:
            use = drafter.use
            _swap_when_built(native, load_small, lambda r: worker.call(lambda: use(r)))
        # Every form of the draw gives the same tokens, so this one needs no care about streams.
        native.add_done_callback(lambda built: _use_native_draw(worker, built))
    progress("KV pool")
    return worker, SchedulerConfig(
        num_pages=budget.num_pages,
        page_size=budget.page_size,
        max_num_seqs=config.schedule.max_num_seqs,
        max_step_tokens=_step_tokens(config, device),
        max_model_len=max_model_len,
        enable_prefix_cache=config.cache.enable_prefix_cache,
        prefix_block=0 if windows is None else windows.block,
        host_pages=budget.host_pages,
        hash_root=chain_root(
            str(folder.resolve()).encode(),
            str(dtype).encode(),
            config.model.quantization.encode(),
            "/".join(form.name for form in formats).encode(),
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


def formats_of(config: EngineConfig, spec: ModelSpec, shard: Shard) -> list[KVFormat]:
    """Of the pages of a model's part, layer by layer. `spec`: of the whole model."""
    cache = config.cache
    if COARSE in drafter_names(config.speculation) and cache.kv_format not in HALVES:
        raise StartupError(
            f"the drafter `{COARSE}` reads the upper halves of 8-bit pages: serve with --kv-format "
            f"{' or '.join(HALVES)}."
        )
    try:
        calibration = None
        if cache.kv_calibration is not None:
            calibration = _calibration(Path(cache.kv_calibration))
            calibration.check(cache.kv_format, (spec.num_layers, spec.num_kv_heads, spec.head_dim))
            calibration = calibration.part(*shard.kv_piece(spec.num_kv_heads))
        formats = layer_formats(
            cache.kv_format,
            spec.num_layers,
            shard.spec(spec).num_kv_heads,
            cache.page_size,
            spec.head_dim,
            cache.kv_boundary_layers,
            calibration,
            cache.kv_sink,
            cache.kv_window,
        )
    except ValueError as error:
        raise StartupError(f"{error}.") from error
    if COARSE in drafter_names(config.speculation) and windows_of(formats) is not None:
        raise StartupError(
            f"the drafter `{COARSE}` does not read dense windows: serve without --kv-window and "
            "--kv-sink."
        )
    return formats


def dense_pages_of(config: EngineConfig, device: Device, formats: Sequence[KVFormat]) -> int:
    """Those of dense windows, for all slots and the largest step; 0 where there are none."""
    return dense_page_count(
        windows_of(formats),
        config.schedule.max_num_seqs + 1,
        config.cache.page_size,
        _step_tokens(config, device),
    )


def _calibration(file: Path) -> Calibration:
    try:
        return Calibration.parse(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"the calibration {file} cannot be read: {error}.") from error


def dtype_of(config: EngineConfig, device: Device, spec: ModelSpec) -> torch.dtype:
    name = config.model.dtype
    return DTYPES[name] if name != "auto" else device.default_dtype(DTYPES[spec.dtype])


def context_of(config: EngineConfig, spec: ModelSpec) -> int:
    asked = config.model.max_model_len
    if asked is None:
        return spec.max_position
    if not 1 < asked <= spec.max_position:
        raise StartupError(
            f"max_model_len {asked:,} is not between 2 and the checkpoint's context of "
            f"{spec.max_position:,} tokens."
        )
    return asked


def _step_tokens(config: EngineConfig, device: Device) -> int:
    """Every running sequence gets at least a token a step."""
    schedule = config.schedule
    return schedule.max_step_tokens or max(device.step_tokens, schedule.max_num_seqs)


def budget_of(
    config: EngineConfig,
    device: Device,
    page: int,
    windows: int,
    max_model_len: int,
    before: int,
    activations: int,
    graphs: int,
) -> Budget:
    """`page`: bytes of one, over all layers; `windows`: of dense windows beside the pages."""
    cache = config.cache
    available = device.available_memory()
    return plan_budget(
        total=device.total_memory,
        available=available,
        fraction=cache.memory_fraction,
        weights=max(before - available, 0),
        activations=activations,
        page_bytes=page,
        window_bytes=windows,
        page_size=cache.page_size,
        max_model_len=max_model_len,
        max_num_seqs=config.schedule.max_num_seqs,
        default_cap=device.pool_cap,
        kv_bytes=cache.kv_bytes,
        num_pages=cache.num_pages,
        swap_bytes=_swap_bytes(cache.swap_bytes, device) // config.device.tensor_parallel_size,
        graphs=graphs,
    )


def activations_of(
    config: EngineConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: Device,
    tokens: int | None = None,
) -> int:
    """Bytes that a step of so many tokens, by default the largest, is estimated to take, with as
    many logits rows as there can be."""
    tokens = tokens or _step_tokens(config, device)
    most = config.schedule.max_num_seqs * (1 + config.speculation.max_draft_tokens)
    return activation_bytes(
        max_step_tokens=tokens,
        max_sample_rows=min(tokens, most),
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        attention_size=(spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim,
        vocab_size=spec.vocab_size,
        dtype_bytes=dtype.itemsize,
    )


def _swap_bytes(asked: int | None, device: Device) -> int:
    if asked is None:
        return device.default_swap_bytes()
    free = available_host_memory()
    if asked > free:
        raise StartupError(
            f"swap_bytes asks for {asked / MIB:,.1f} MiB of host memory, but {free / MIB:,.1f} MiB "
            "are free."
        )
    return asked


def _start_native_build(config: DeviceConfig, device: Device) -> Future[NativeOps] | None:
    """Compiles, or finds compiled, while the weights are read."""
    if device.torch_device.type != "cpu" or not config.compile:
        return None
    return start_build(Path(config.cache_dir) if config.cache_dir else None)


def _readers(
    native: Future[NativeOps] | None, formats: Sequence[KVFormat], ranks: int
) -> Future[NativeOps] | None:
    """The native kernels, if they read such pages."""
    if native is None:
        return None
    if ranks > 1:
        log.info(
            "several ranks compute in plain torch operations: the native decoder is one call a "
            "step, in which they could not meet"
        )
        return None
    try:
        for form in formats:
            native_format(form)
    except ValueError as error:
        log.warning("serving with plain torch operations, which are slower: %s", error)
        return None
    return native


def _native_runner(
    model: LanguageModel, native: Future[NativeOps] | None, patience: float | None
) -> Runner | None:
    """The runner on native kernels, if they are there in time and fit the model."""
    if native is None or not isinstance(model, Decoder):
        return None
    try:
        return native_runner(model, native.result(patience))
    except (TimeoutError, BuildError, ValueError):
        return None  # `_swap_when_built` tries again and says what is wrong


def eager_runner(
    model: LanguageModel, dtype: torch.dtype, config: EngineConfig, backend: Backend
) -> Runner:
    if isinstance(model, Decoder):
        mode: LinearMode = "packed" if model.embedding.device.type == "cpu" else "dense"
        prepare_linears(model, "invariant" if config.device.deterministic else mode)
    elif config.device.deterministic:
        raise StartupError(
            f"a {model.spec.model_type} model runs through the transformers library, whose linear "
            "layers are not batch-invariant: serve it without --deterministic."
        )
    return EagerRunner(model, backend.ops(model.spec, dtype))


def _use_native_draw(worker: Worker, built: Future[NativeOps]) -> None:
    if built.exception() is None:
        worker.draw_by(built.result().sampling())


def _swap_when_built(
    native: Future[NativeOps], load: Callable[[], LanguageModel], use: Callable[[Runner], None]
) -> None:
    """Has a model computed by the native kernels as soon as these are built."""
    started = time.monotonic()

    def swap(built: Future[NativeOps]) -> None:
        try:
            ops = built.result()
            model = load()
            assert isinstance(model, Decoder)
            use(native_runner(model, ops))
        except (BuildError, ValueError, CheckpointError) as error:
            log.warning("serving with plain torch operations, which are slower: %s", error)
        else:
            log.info("native kernels in use after %.1f s", time.monotonic() - started)

    native.add_done_callback(swap)
