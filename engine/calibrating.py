"""A model and what reads texts with it, for `foresight calibrate` and `foresight quantize`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tokenizers import Tokenizer

from engine.config import EngineConfig
from engine.errors import StartupError
from engine.sizes import context_of, dtype_of
from kernels.cpu.build import BuildError, start_build
from kernels.ops import Ops
from kernels.torch_ops import TorchOps
from models.errors import CheckpointError
from models.loader import load_model, read_spec
from models.weights import resolve_checkpoint
from worker.device import DeviceError, resolve_device
from worker.kv_quality import Reader


def build_reader(config: EngineConfig) -> tuple[Reader, Callable[[str], Sequence[int]], str]:
    """The reader, the tokenizer, and in words what they run on. Raises `StartupError`."""
    try:
        device = resolve_device(config.device.device)
        folder = resolve_checkpoint(config.model.model, config.model.revision)
        spec = read_spec(folder)
        dtype = dtype_of(config, device, spec)
        model = load_model(
            folder,
            dtype=dtype,
            device=device.torch_device,
            max_model_len=context_of(config, spec),
            load_format=config.model.load_format,
            quantization=config.model.quantization,
        )
    except (CheckpointError, DeviceError) as error:
        raise StartupError(str(error)) from error
    file = folder / "tokenizer.json"
    if not file.exists():
        raise StartupError(f"{folder} has no tokenizer.json to read prompts with.")
    tokenizer = Tokenizer.from_file(str(file))

    def tokenize(text: str) -> Sequence[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    ops: Ops = TorchOps()
    if device.torch_device.type == "cpu" and config.device.compile:
        cache = Path(config.device.cache_dir) if config.device.cache_dir else None
        with suppress(BuildError):  # slower then, and the same
            ops = start_build(cache).result()
    name = str(dtype).removeprefix("torch.")
    return Reader(model, ops, dtype, device.torch_device), tokenize, f"{device.name}, {name}"
