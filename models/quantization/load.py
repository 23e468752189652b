"""Fills a decoder whose weights are kept in few bits.

The decoder is built on the meta device, where its linear layers take no memory; each of them is
replaced as its tensors are read: by a `QuantizedLinear`, by a dense layer where the checkpoint or
the format leaves it dense, or by both side by side where fused projections differ. So what is there
in full is one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kernels.linear.choose import quantized_linear
from kernels.linear.dense import DenseLinear
from kernels.linear.formats import QuantizedWeight, WeightFormat, join
from kernels.linear.quantized import SplitLinear
from models.decoder import Decoder, DecoderLayer
from models.errors import CheckpointError
from models.quantization.layout import Layout
from models.quantization.layouts import format_for
from models.rope import cos_sin_table
from models.weights import Progress, check_unexpected, checkpoint_files, fill, fill_dummy

META = torch.device("meta")


class Source(Protocol):
    """Where tensors come from, by their names in a checkpoint."""

    def __contains__(self, name: str) -> bool: ...

    def take(self, name: str) -> Tensor:
        """On the CPU. Raises `CheckpointError` if there is none."""
        ...


class StoredTensors:
    """A checkpoint's, read when they are asked for. A context manager."""

    def __init__(self, folder: Path) -> None:
        """Raises `CheckpointError`."""
        self._folder, self._stack = folder, ExitStack()
        self._files: dict[str, safe_open] = {}
        self._untaken: set[str] = set()
        for path in checkpoint_files(folder):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                names = list(file.keys())
            except (SafetensorError, OSError) as error:
                self._stack.close()
                raise CheckpointError(f"{path} is damaged or incomplete: {error}.") from error
            self._files |= dict.fromkeys(names, file)
        self._untaken = set(self._files)

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def take(self, name: str) -> Tensor:
        if name not in self._files:
            raise CheckpointError(f"{self._folder} lacks {name}.")
        self._untaken.discard(name)
        try:
            found: Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder}: {name} cannot be read: {error}.") from error
        return found

    def check_all_taken(self) -> None:
        """Raises `CheckpointError` for tensors that have no place in the model.

        Some exporters give every quantised layer a bias, and scales for a KV cache of their own.
        """
        left = [name for name in self._untaken if not name.endswith((".k_scale", ".v_scale"))]
        check_unexpected(
            self._folder, [n for n in left if not n.endswith(".bias") or self.take(n).any()]
        )


class DummyTensors:
    """Random weights of a decoder's shapes: those that `dummy_weights` gives a dense one."""

    def __init__(self, decoder: Decoder, seed: int) -> None:
        """decoder: on the meta device."""
        self._shapes = {name: view.shape for name, view in decoder.targets().items()}
        self._seeds = {name: seed + i for i, name in enumerate(self._shapes)}
        self._dtype = decoder.embedding.dtype

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def take(self, name: str) -> Tensor:
        found = torch.empty(self._shapes[name], dtype=self._dtype)
        fill_dummy(name, found, self._seeds[name])
        return found


@dataclass(slots=True)
class Projection:
    """A linear layer of a decoder, and the checkpoint's layers that are fused in it."""

    parent: nn.Module
    attribute: str
    layer: DenseLinear
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> outputs, inputs


def projections(decoder: Decoder) -> list[Projection]:
    """All linear layers but a tied head. Targets are views of their weights."""
    found = {
        id(child.weight): Projection(parent, name, child)
        for parent in decoder.modules()
        for name, child in parent.named_children()
        if isinstance(child, DenseLinear)
    }
    for name, view in decoder.targets().items():
        projection = found.get(id(view._base))
        if projection is not None:
            projection.parts[name.removesuffix(".weight")] = (view.shape[0], view.shape[1])
    return [projection for projection in found.values() if projection.parts]


def quantizable(found: Sequence[Projection]) -> dict[str, tuple[int, int]]:
    """The checkpoint's layers that are put in few bits, name -> outputs, inputs.

    The head decides between words and a router between experts: both are left dense, as other
    engines do.
    """
    parts = {name: shape for projection in found for name, shape in projection.parts.items()}
    return {n: s for n, s in parts.items() if n != "lm_head" and not n.endswith(".mlp.gate")}


def load_quantized(
    decoder: Decoder,
    folder: Path,
    device: torch.device,
    stored: Layout | None,
    quantization: str,
    *,
    dummy_seed: int | None = None,
    progress: Progress = lambda _: None,
) -> None:
    """Fills a decoder that was built on the meta device from a checkpoint.

    stored: how its quantised layers lie there, None if it is dense; quantization: what its weights
    are rounded to then, or none; dummy_seed: of random weights, in place of the checkpoint's.
    Raises `CheckpointError`.
    """
    if stored is not None and quantization != "none":
        raise CheckpointError(
            f"{folder} is quantized already: leave --quantization out, or give its dense original."
        )
    if stored is not None and dummy_seed is not None:
        raise CheckpointError(
            "random weights are dense: for random weights in few bits, give a dense checkpoint's "
            "folder and --quantization."
        )
    form = None
    if stored is None:
        inputs = [shape[1] for shape in quantizable(projections(decoder)).values()]
        form = format_for(quantization, inputs)
    if dummy_seed is not None:
        fill_quantized(decoder, DummyTensors(decoder, dummy_seed), device, None, form, progress)
        return
    with StoredTensors(folder) as source:
        fill_quantized(decoder, source, device, stored, form, progress)
        source.check_all_taken()


def fill_quantized(
    decoder: Decoder,
    source: Source,
    device: torch.device,
    stored: Layout | None,
    form: WeightFormat | None,
    progress: Progress,
) -> None:
    """decoder: on the meta device; it is on `device` afterwards, and has no `targets` any more.

    stored: how quantised layers lie in the source; form: what dense ones are rounded to.
    Raises `CheckpointError`.
    """
    found = projections(decoder)
    narrowed = quantizable(found) if form is not None else {}
    _allocate_rest(decoder, device)
    for name, target in decoder.targets().items():
        if target.device != META:
            fill(target, name, source.take(name))
    dtype = decoder.embedding.dtype
    for projection in found:
        parts = []
        for name, shape in projection.parts.items():
            progress(f"loading weights: {name}")
            part = _part(source, name, shape, device, stored)
            if form is not None and isinstance(part, Tensor) and name in narrowed:
                part = form.quantize(part.to(device))
            parts.append(part)
        bias = None
        if projection.layer.bias is not None:
            biases = [source.take(f"{name}.bias") for name in projection.parts]
            bias = torch.cat(biases).to(device, dtype)
            if bias.shape != projection.layer.bias.shape:
                raise CheckpointError(f"the bias of {name} has shape {list(bias.shape)}.")
        setattr(projection.parent, projection.attribute, _layer(parts, bias, device, dtype))
    if device.type == "cuda":  # what the matrices took in full counts as free memory again
        torch.cuda.empty_cache()


def _part(
    source: Source,
    name: str,
    shape: tuple[int, int],
    device: torch.device,
    stored: Layout | None,
) -> QuantizedWeight | Tensor:
    """One matrix of the checkpoint, as it has it."""
    if stored is None or f"{name}.{stored.marker}" not in source:
        weight = source.take(f"{name}.weight")
        if weight.shape != shape or not weight.is_floating_point() or weight.itemsize < 2:
            raise CheckpointError(
                f"{name}.weight is {weight.dtype} of shape {list(weight.shape)} where config.json "
                f"implies numbers of 16 or 32 bits of shape {list(shape)}."
            )
        return weight
    tensors = {s: source.take(f"{name}.{s}").to(device) for s in stored.suffixes}
    optional = [s for s in stored.optional if f"{name}.{s}" in source]
    tensors |= {s: source.take(f"{name}.{s}").to(device) for s in optional}
    try:
        return stored.read(tensors, *shape)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}.") from error


def _layer(
    parts: Sequence[QuantizedWeight | Tensor],
    bias: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """parts: of projections that are fused if they can be; dense ones may lie elsewhere still."""
    dense = [part for part in parts if isinstance(part, Tensor)]
    if len(dense) == len(parts):
        return DenseLinear(
            _constant(torch.cat([part.to(device, dtype) for part in dense])),
            None if bias is None else _constant(bias),
        )
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    joined = join(quantized) if len(quantized) == len(parts) else None
    if joined is not None:
        return quantized_linear(joined, bias, dtype)
    sizes = [p.shape[0] if isinstance(p, Tensor) else p.outputs for p in parts]
    biases = [None] * len(parts) if bias is None else bias.split(sizes)
    return SplitLinear([_layer([p], b, device, dtype) for p, b in zip(parts, biases, strict=True)])


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _allocate_rest(decoder: Decoder, device: torch.device) -> None:
    """Takes everything but the linear layers from the meta device to `device`, uninitialised."""
    for module in decoder.modules():
        if not isinstance(module, DenseLinear):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, _constant(torch.empty_like(parameter, device=device)))
    if decoder.spec.tied_embeddings:
        decoder.head = DenseLinear(decoder.embedding)
    table: Tensor | None = None
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        attention = layer.attention
        if table is None and attention.layer.cos_sin is not None:
            positions = attention.layer.cos_sin.shape[0]
            spec = decoder.spec
            table = cos_sin_table(spec.rope, spec.head_dim, positions).to(device)
        attention.layer = replace(
            attention.layer,
            cos_sin=table,
            q_norm=attention.q_norm,
            k_norm=attention.k_norm,
        )
