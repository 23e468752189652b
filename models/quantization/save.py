"""Makes a checkpoint in few bits of a dense one.

Layers are rounded as `load.py` rounds them when a dense checkpoint is loaded with that format, so
both give the same logits. Files are made one after another: it takes the memory of the largest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from kernels.linear.formats import WeightFormat
from models.decoder import Decoder
from models.errors import CheckpointError
from models.loader import read_spec
from models.quantization.layout import WritableLayout
from models.quantization.layouts import format_for, layout_for, stored_layout
from models.quantization.load import META, projections, quantizable
from models.weights import PATTERNS, Progress, checkpoint_files, read_json, read_tensors

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes of tensors."""

    before: int
    after: int
    form: str  # in words


def quantize_checkpoint(
    folder: Path, output: Path, name: str, progress: Progress = lambda _: None
) -> Written:
    """folder: a dense checkpoint; output: a folder that is not there yet; name: int8, int6, int4 or
    fp8.

    Until everything is written it is called `output`.partial. Raises `CheckpointError`.
    """
    if output.exists():
        raise CheckpointError(f"{output} exists already.")
    plan = _Plan.of(folder, name)
    partial = output.with_name(output.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)  # of a run that was cut off
    try:
        partial.mkdir(parents=True)
        written = _write(folder, partial, plan, progress)
        partial.rename(output)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return written


@dataclass(frozen=True, slots=True)
class _Plan:
    form: WeightFormat
    layout: WritableLayout
    shapes: dict[str, tuple[int, int]]  # of layers to quantise
    ignored: tuple[str, ...]  # linear layers that stay dense

    @classmethod
    def of(cls, folder: Path, name: str) -> _Plan:
        spec = read_spec(folder)
        if not spec.native:
            raise CheckpointError(
                f"a {spec.model_type} model has no native decoder here, which quantized weights "
                "are for."
            )
        if stored_layout(read_json(folder, "config.json")) is not None:
            raise CheckpointError(f"{folder} is quantized already: give its dense original.")
        found = projections(Decoder(spec, device=META))
        shapes = quantizable(found)
        form = format_for(name, [inputs for _, inputs in shapes.values()])
        linear = [part for projection in found for part in projection.parts]
        heads = ["lm_head"] if spec.tied_embeddings else []
        ignored = (*heads, *(part for part in linear if part not in shapes))
        return cls(form, layout_for(form), shapes, ignored)

    def tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What is written for a tensor of the dense checkpoint."""
        layer = name.removesuffix(".weight")
        if layer == name or layer not in self.shapes:
            yield name, tensor
            return
        if tensor.shape != self.shapes[layer] or not tensor.is_floating_point():
            raise CheckpointError(
                f"{name} is {tensor.dtype} of shape {list(tensor.shape)} where config.json implies "
                f"numbers of shape {list(self.shapes[layer])}."
            )
        for suffix, part in self.layout.write(self.form.quantize(tensor)).items():
            yield f"{layer}.{suffix}", part.contiguous()


def _write(folder: Path, output: Path, plan: _Plan, progress: Progress) -> Written:
    before = after = 0
    files: dict[str, str] = {}
    for path in checkpoint_files(folder):
        made: dict[str, Tensor] = {}
        for name, tensor in read_tensors(path):
            progress(name)
            before += tensor.nbytes
            made |= plan.tensors(name, tensor)
        after += sum(tensor.nbytes for tensor in made.values())
        files |= dict.fromkeys(made, path.name)
        save_file(made, output / path.name, metadata={"format": "pt"})
    if (folder / INDEX).exists():
        index = {"metadata": {"total_size": after}, "weight_map": dict(sorted(files.items()))}
        _dump(output / INDEX, index)
    for pattern in PATTERNS:
        for path in folder.glob(pattern):
            if path.suffix != ".safetensors" and path.name not in (INDEX, "config.json"):
                shutil.copyfile(path, output / path.name)
    config = read_json(folder, "config.json")
    config["quantization_config"] = plan.layout.config(plan.ignored)
    _dump(output / "config.json", config)
    return Written(before, after, plan.form.name)


def _dump(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
