"""From the configuration to a worker that is ready to run: the one place that chooses the parts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.config import DeviceConfig, EngineConfig
from engine.drafters import Draft, build_drafting, load_draft
from engine.errors import StartupError
from engine.scheduling import drafter_names
from kernels.cpu.build import BuildError, start_build
from kernels.cpu.ops import NativeOps
from kernels.cpu.packed import native_format
from kernels.kv.calibration import Calibration
from kernels.kv.format import KVFormat, windows_of
from kernels.kv.presets import HALVES, layer_formats
from kernels.linear.prepare import LinearMode, isolate_rows, prepare_linears
from kernels.linear.quantized import is_quantized, parameter_count, weight_bytes
from kernels.torch_ops import TorchOps
from models.decoder import Decoder
from models.errors import CheckpointError
from models.loader import load_model, read_spec
from models.model import LanguageModel
from models.spec import ModelSpec
from models.weights import resolve_checkpoint
from scheduler.prefix import chain_root
from scheduler.request import SchedulerConfig
from worker.device import DTYPES, Device, DeviceError, available_host_memory, resolve_device
from worker.drafters.registry import COARSE
from worker.executor import ThreadExecutor
from worker.kv_pool import allocate_host_pool, allocate_pool, page_bytes, window_bytes
from worker.native import native_runner
from worker.runner import EagerRunner, Runner
from worker.sampler import Sampler
from worker.sampling_state import SlotSampling
from worker.sizing import MIB, Budget, BudgetError, activation_bytes, plan_budget
from worker.slots import SlotTable
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
        return _build(config, progress, patient)
    except (CheckpointError, BudgetError, DeviceError) as error:
        raise StartupError(str(error)) from error


def _build(
    config: EngineConfig, progress: Callable[[str], None], patient: bool
) -> tuple[Worker, SchedulerConfig]:
    device = resolve_device(config.device.device)
    threads = config.device.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    native = _start_native_build(config.device, device)
    progress("imports")

    folder = resolve_checkpoint(config.model.model, config.model.revision)
    spec = read_spec(folder)
    max_model_len = context_of(config, spec)
    dtype = dtype_of(config, device, spec)

    load = partial(
        load_model,
        folder,
        dtype=dtype,
        device=device.torch_device,
        max_model_len=max_model_len,
        load_format=config.model.load_format,
        quantization=config.model.quantization,
        progress=log.debug,
    )
    formats = _formats(config, spec)

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
    readers = _readers(native, formats)
    runner = _native_runner(model, readers, patience) or _torch_runner(model, config, device)
    small: Draft | None = None
    if draft is not None:
        parameters = parameter_count(draft)
        arithmetic = _native_runner(draft, native, patience) or _torch_runner(draft, config, device)
        small = Draft(arithmetic, draft.spec, dtype, parameters)
    progress(f"weights, {runner.name} arithmetic")

    page = page_bytes(spec, config.cache.page_size, dtype, formats)
    if small is not None:  # a page of the target's has one of the draft model's beside it
        page += page_bytes(small.spec, config.cache.page_size, dtype)
    num_slots, page_size = config.schedule.max_num_seqs + 1, config.cache.page_size
    windows = windows_of(formats)
    copies = dense_page_count(windows, num_slots, page_size, _step_tokens(config, device))
    dense = window_bytes(spec, copies, page_size, dtype, formats)
    budget = _budget(config, device, spec, page, dense, dtype, max_model_len, before)
    log.info("%s", budget)
    near: WindowPages | None = None
    if windows is not None:
        most = -(-max_model_len // page_size)
        near = WindowPages(windows, copies, num_slots, most, page_size, device.torch_device)
    slots = SlotTable(num_slots, max_model_len, page_size, device.torch_device, near)
    sampling = SlotSampling(num_slots, spec.vocab_size, device.torch_device)
    kv = allocate_pool(
        spec, budget.num_pages, page_size, dtype, device.torch_device, formats, copies
    )
    # One more: page 0 is as little used as on the device.
    host = allocate_host_pool(kv, budget.host_pages + 1) if budget.host_pages else []
    sampler = Sampler(sampling, slots.tokens)
    drafting = build_drafting(
        config.speculation,
        slots,
        sampler,
        small,
        Draft(runner, spec, dtype, size),
        kv,
        budget.num_pages,
        _step_tokens(config, device),
    )
    worker = Worker(
        runner,
        kv,
        slots,
        sampler,
        ThreadExecutor(threads),
        WorkerFacts(
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            num_pages=budget.num_pages,
            page_size=budget.page_size,
            device=device.name,
            dtype=str(dtype).removeprefix("torch."),
            drafters=drafter_names(config.speculation),
            beside=0.0 if drafting is None else drafting.slowdown,
        ),
        host,
        drafting,
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


def _formats(config: EngineConfig, spec: ModelSpec) -> list[KVFormat]:
    cache = config.cache
    if COARSE in drafter_names(config.speculation) and cache.kv_format not in HALVES:
        raise StartupError(
            f"the drafter `{COARSE}` reads the upper halves of 8-bit pages: serve with --kv-format "
            f"{' or '.join(HALVES)}."
        )
    try:
        formats = layer_formats(
            cache.kv_format,
            spec.num_layers,
            spec.num_kv_heads,
            cache.page_size,
            spec.head_dim,
            cache.kv_boundary_layers,
            None if cache.kv_calibration is None else _calibration(Path(cache.kv_calibration)),
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


def _budget(
    config: EngineConfig,
    device: Device,
    spec: ModelSpec,
    page: int,
    windows: int,
    dtype: torch.dtype,
    max_model_len: int,
    before: int,
) -> Budget:
    cache = config.cache
    available = device.available_memory()
    return plan_budget(
        total=device.total_memory,
        available=available,
        fraction=cache.memory_fraction,
        weights=max(before - available, 0),
        activations=activation_bytes(
            max_step_tokens=_step_tokens(config, device),
            max_sample_rows=min(
                _step_tokens(config, device),
                config.schedule.max_num_seqs * (1 + config.speculation.max_draft_tokens),
            ),
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            attention_size=(spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim,
            vocab_size=spec.vocab_size,
            dtype_bytes=dtype.itemsize,
        ),
        page_bytes=page,
        window_bytes=windows,
        page_size=cache.page_size,
        max_model_len=max_model_len,
        max_num_seqs=config.schedule.max_num_seqs,
        default_cap=device.pool_cap,
        kv_bytes=cache.kv_bytes,
        num_pages=cache.num_pages,
        swap_bytes=_swap_bytes(cache.swap_bytes, device),
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
    native: Future[NativeOps] | None, formats: Sequence[KVFormat]
) -> Future[NativeOps] | None:
    """The native kernels, if they read such pages."""
    if native is None:
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


def _torch_runner(model: LanguageModel, config: EngineConfig, device: Device) -> Runner:
    if isinstance(model, Decoder):
        mode: LinearMode = "packed" if device.torch_device.type == "cpu" else "dense"
        prepare_linears(model, "invariant" if config.device.deterministic else mode)
    elif config.device.deterministic:
        raise StartupError(
            f"a {model.spec.model_type} model runs through the transformers library, whose linear "
            "layers are not batch-invariant: serve it without --deterministic."
        )
    return EagerRunner(model, TorchOps())


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
