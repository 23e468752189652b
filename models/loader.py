"""From a checkpoint's folder to a model that can run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from models.decoder import Decoder
from models.errors import CheckpointError
from models.spec import ModelSpec
from models.weights import dummy_weights, load_weights, read_json


def read_spec(folder: Path) -> ModelSpec:
    """What config.json and generation_config.json say. Raises `CheckpointError`."""
    generation = "generation_config.json"
    has_generation = (folder / generation).exists()
    return ModelSpec.from_hf(
        read_json(folder, "config.json"), read_json(folder, generation) if has_generation else None
    )


def load_decoder(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    max_model_len: int | None = None,
    load_format: str = "safetensors",
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Decoder:
    """Builds and fills the decoder; `load_format` is safetensors or dummy (random weights).

    Raises `CheckpointError` (also `UnsupportedArchitecture`), one sentence for a person.
    """
    decoder = Decoder(read_spec(folder), dtype=dtype, device=device, max_model_len=max_model_len)
    if load_format == "dummy":
        dummy_weights(decoder.targets(), seed)
    elif load_format == "safetensors":
        load_weights(folder, decoder.targets(), progress=progress)
    else:
        raise CheckpointError(f"load_format {load_format!r} is not one of safetensors, dummy.")
    return decoder.eval()
