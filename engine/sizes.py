"""What a configuration means for a checkpoint and a device: dtype, context, page formats, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import StartupError
from engine.scheduling import drafter_names
from kernels.kv.calibration import Calibration
from kernels.kv.format import KVFormat, windows_of
from kernels.kv.presets import HALVES, layer_formats
from models.balance import apply_balance
from models.model import LanguageModel
from models.parallel import Shard
from models.spec import ModelSpec
from worker.device import DTYPES, Device, available_host_memory
from worker.drafters.registry import COARSE, MODEL
from worker.sizing import MIB, Budget, activation_bytes, plan_budget
from worker.window_pages import dense_page_count


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


def step_tokens(config: EngineConfig, device: Device) -> int:
    """Every running sequence gets at least a token a step."""
    schedule = config.schedule
    return schedule.max_step_tokens or max(device.step_tokens, schedule.max_num_seqs)


def calibration_of(config: EngineConfig, spec: ModelSpec, shard: Shard) -> Calibration | None:
    """A part's, of the model whose `spec` this is; None where there is none."""
    cache = config.cache
    if cache.kv_calibration is None:
        return None
    try:
        calibration = _calibration(Path(cache.kv_calibration))
        calibration.check(cache.kv_format, (spec.num_layers, spec.num_kv_heads, spec.head_dim))
    except ValueError as error:
        raise StartupError(f"{error}.") from error
    return calibration.part(*shard.kv_piece(spec.num_kv_heads))


def formats_of(
    config: EngineConfig, spec: ModelSpec, shard: Shard, calibration: Calibration | None
) -> list[KVFormat]:
    """Of the pages of a model's part, layer by layer. `spec`: of the whole model."""
    cache = config.cache
    if COARSE in drafter_names(config.speculation) and cache.kv_format not in HALVES:
        raise StartupError(
            f"the drafter `{COARSE}` reads the upper halves of 8-bit pages: serve with --kv-format "
            f"{' or '.join(HALVES)}."
        )
    if cache.kv_demote:
        _check_demotion(config)
    try:
        return layer_formats(
            cache.kv_format,
            spec.num_layers,
            shard.spec(spec).num_kv_heads,
            cache.page_size,
            spec.head_dim,
            cache.kv_boundary_layers,
            calibration,
            cache.kv_sink,
            cache.kv_window,
            cache.kv_demote,
        )
    except ValueError as error:
        raise StartupError(f"{error}.") from error


def _check_demotion(config: EngineConfig) -> None:
    if config.device.deterministic:
        raise StartupError(
            "with --kv-demote a text depends on how many others there are: it cannot be had with "
            "--deterministic."
        )
    if MODEL in drafter_names(config.speculation):
        raise StartupError(
            "--kv-demote does not go with a draft model, whose keys and values lie under the pages "
            f"that are given up: serve without one; of the drafters all but `{MODEL}` can be used."
        )


def use_formats(
    model: LanguageModel, formats: Sequence[KVFormat], calibration: Calibration | None
) -> None:
    """Tells a freshly loaded model how its pages hold keys and values, and balances their channels
    as the calibration says. Raises `StartupError`."""
    if calibration is not None:
        try:
            apply_balance(model, calibration.balance)
        except ValueError as error:
            raise StartupError(f"{error}.") from error
    model.use_formats(formats)


def _calibration(file: Path) -> Calibration:
    try:
        return Calibration.parse(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"the calibration {file} cannot be read: {error}.") from error


def dense_pages_of(config: EngineConfig, device: Device, formats: Sequence[KVFormat]) -> int:
    """Those of dense windows, for all slots and the largest step; 0 where there are none."""
    return dense_page_count(
        windows_of(formats),
        config.schedule.max_num_seqs + 1,
        config.cache.page_size,
        step_tokens(config, device),
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
    tokens = tokens or step_tokens(config, device)
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
