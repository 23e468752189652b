"""Which kernels compute a model: native ones where they are built, else operation by operation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch

from engine.backends import Backend
from engine.config import DeviceConfig, EngineConfig
from engine.errors import StartupError
from kernels.cpu.build import BuildError, start_build
from kernels.cpu.ops import NativeOps
from kernels.cpu.packed import native_format
from kernels.kv.format import KVFormat
from kernels.linear.prepare import LinearMode, prepare_linears
from models.decoder import Decoder
from models.errors import CheckpointError
from models.model import LanguageModel
from worker.device import Device
from worker.native import native_runner
from worker.runner import EagerRunner, Runner
from worker.worker import Worker

log = logging.getLogger(__name__)


def start_native_build(config: DeviceConfig, device: Device) -> Future[NativeOps] | None:
    """Compiles, or finds compiled, while the weights are read."""
    if device.torch_device.type != "cpu" or not config.compile:
        return None
    return start_build(Path(config.cache_dir) if config.cache_dir else None)


def native_readers(
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


def native_runner_of(
    model: LanguageModel, native: Future[NativeOps] | None, patience: float | None
) -> Runner | None:
    """The runner on native kernels, if they are there in time and fit the model."""
    if native is None or not isinstance(model, Decoder):
        return None
    try:
        return native_runner(model, native.result(patience))
    except (TimeoutError, BuildError, ValueError):
        return None  # `swap_when_built` tries again and says what is wrong


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


def swap_when_built(
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


def use_native_draw(worker: Worker, built: Future[NativeOps]) -> None:
    if built.exception() is None:
        worker.draw_by(built.result().sampling())
