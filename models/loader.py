"""From a checkpoint's folder to a model that can run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models.decoder import Decoder
from models.errors import CheckpointError, UnsupportedArchitecture
from models.parallel import ALONE, Collective
from models.quantization.layouts import stored_layout
from models.quantization.load import META, load_quantized
from models.spec import ModelSpec
from models.weights import dummy_weights, load_weights, read_json

if TYPE_CHECKING:
    from models.transformers_fallback import TransformersDecoder


def read_spec(folder: Path) -> ModelSpec:
    """What config.json and generation_config.json say. Raises `CheckpointError`.

    What the native decoder does not compute is left to the transformers library: `spec.native` is
    False then, and `models.transformers_fallback.load_fallback` loads it.
    """
    generation = "generation_config.json"
    has_generation = (folder / generation).exists()
    config = read_json(folder, "config.json")
    try:
        return ModelSpec.from_hf(config, read_json(folder, generation) if has_generation else None)
    except UnsupportedArchitecture as error:
        # Imports transformers, which takes seconds, so only when there is no other way.
        from models.transformers_fallback import fallback_spec

        try:
            return fallback_spec(folder)
        except UnsupportedArchitecture as other:
            raise other from error


def load_decoder(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    max_model_len: int | None = None,
    load_format: str = "safetensors",
    seed: int = 0,
    quantization: str = "none",
    progress: Callable[[str], None] = lambda _: None,
    collective: Collective = ALONE,
) -> Decoder:
    """Builds and fills the decoder; `load_format` is safetensors or dummy (random weights);
    with a `collective` of several ranks, this one's part of it.

    quantization: what a dense checkpoint's weights are rounded to, see
    `models.quantization.layouts.format_for`.
    Raises `CheckpointError` (also `UnsupportedArchitecture`), one sentence for a person.
    """
    spec = read_spec(folder)
    if not spec.native:
        raise UnsupportedArchitecture(f"{spec.model_type} has no native decoder.")
    if load_format not in ("safetensors", "dummy"):
        raise CheckpointError(f"load_format {load_format!r} is not one of safetensors, dummy.")
    stored = stored_layout(read_json(folder, "config.json"))
    if stored is not None or quantization != "none":
        if collective.shard.size > 1:
            raise CheckpointError(
                "weights in few bits are not divided among ranks yet: serve them without "
                "--tensor-parallel-size."
            )
        meta = Decoder(spec, dtype=dtype, device=META, max_model_len=max_model_len)
        load_quantized(
            meta,
            folder,
            device or torch.device("cpu"),
            stored,
            quantization,
            dummy_seed=seed if load_format == "dummy" else None,
            progress=progress,
        )
        return meta.eval()
    decoder = Decoder(
        spec, dtype=dtype, device=device, max_model_len=max_model_len, collective=collective
    )
    if load_format == "dummy":
        dummy_weights(decoder.targets(), seed)
    else:
        load_weights(folder, decoder.targets(), cuts=decoder.cuts(), progress=progress)
    return decoder.eval()


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    max_model_len: int | None = None,
    load_format: str = "safetensors",
    seed: int = 0,
    quantization: str = "none",
    progress: Callable[[str], None] = lambda _: None,
    collective: Collective = ALONE,
) -> Decoder | TransformersDecoder:
    """`load_decoder`, or the transformers library where there is no native decoder."""
    spec = read_spec(folder)
    if spec.native:
        return load_decoder(
            folder,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            load_format=load_format,
            seed=seed,
            quantization=quantization,
            progress=progress,
            collective=collective,
        )
    collective.shard.spec(spec)  # refuses
    if quantization != "none":
        raise CheckpointError(
            "weights are quantized for the native decoders only, and this architecture has none: "
            "serve it with --quantization none."
        )
    from models.transformers_fallback import load_fallback

    return load_fallback(
        folder, dtype=dtype, device=device, load_format=load_format, seed=seed, progress=progress
    )
