"""Tiny checkpoints in few bits, packed number by number from the descriptions of their layouts.

Each packer draws codes, scales and zero points, and returns the tensors and the numbers they stand
for, so that the same checkpoint can be written densely too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.checkpoints import save

LINEAR = re.compile(r"(.*_proj)\.weight")
Random = np.random.Generator
# outputs, inputs -> tensors by suffix, and the numbers [outputs, inputs] fp32
Packer = Callable[[Random, int, int], tuple[dict[str, Tensor], np.ndarray]]


def write_pair(
    folder: Path,
    config: dict[str, Any],
    pack: Packer,
    model_type: str = "llama",
    skip: str = "nothing",
    **changes: Any,
) -> tuple[Path, Path]:
    """The folders of a checkpoint in few bits and of the same numbers densely.

    skip: a pattern of layers that are dense in both.
    """
    dense, stored = folder / "dense", folder / "stored"
    save(dense, model_type, tie_word_embeddings=False, num_hidden_layers=2, **changes)
    tensors = load_file(dense / "model.safetensors")
    rng = np.random.default_rng(0)
    packed: dict[str, Tensor] = {}
    for name in sorted(tensors):
        found = LINEAR.fullmatch(name)
        if found is None or re.search(skip, name):
            packed[name] = tensors[name]
            continue
        parts, numbers = pack(rng, *tensors[name].shape)
        packed |= {f"{found[1]}.{suffix}": tensor for suffix, tensor in parts.items()}
        tensors[name] = torch.from_numpy(numbers.astype(np.float32))
    save_file(tensors, dense / "model.safetensors")
    stored.mkdir()
    save_file({n: t.contiguous() for n, t in packed.items()}, stored / "model.safetensors")
    settings = json.loads((dense / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    return stored, dense


def words(codes: np.ndarray, bits: int, places: list[int] | None = None) -> Tensor:
    """codes: [rows, n] -> [rows, n * bits / 32] int32; code places[i] of a word's at its bits i."""
    each = 32 // bits
    places = places or list(range(each))
    made = np.zeros((codes.shape[0], -(-codes.shape[1] // each)), dtype=np.uint32)
    for i, place in enumerate(places):
        column = codes[:, place::each].astype(np.uint32)
        made[:, : column.shape[1]] |= column << np.uint32(bits * i)
    return torch.from_numpy(made.view(np.int32))


def draw(
    rng: Random, bits: int, outputs: int, inputs: int, groups: int, middle_only: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [out, in], fp16 scales and zero points [out, groups]."""
    codes = rng.integers(0, 1 << bits, (outputs, inputs))
    scales = rng.uniform(0.5, 2.0, (outputs, groups)) / (1 << bits) / inputs**0.5
    zeros = rng.integers(0, 1 << bits, (outputs, groups))
    if middle_only:
        zeros[:] = 1 << (bits - 1)
    return codes, scales.astype(np.float16), zeros


def numbers_of(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group_of: np.ndarray
) -> np.ndarray:
    """group_of: [in], the group of each input."""
    offsets = (codes - zeros[:, group_of]).astype(np.float32)
    return offsets * scales[:, group_of].astype(np.float32)


def awq(group: int) -> Packer:
    def pack(rng: Random, outputs: int, inputs: int) -> tuple[dict[str, Tensor], np.ndarray]:
        size = inputs if group == -1 else group
        codes, scales, zeros = draw(rng, 4, outputs, inputs, inputs // size, False)
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        parts = {
            "qweight": words(codes.T, 4, order),
            "qzeros": words(zeros.T, 4, order),
            "scales": torch.from_numpy(scales.T.copy()),
        }
        return parts, numbers_of(codes, scales, zeros, np.arange(inputs) // size)

    return pack


def gptq(bits: int, group: int, *, symmetric: bool, v2: bool = False, shuffled: bool) -> Packer:
    # The permutation comes from the inputs' activations, which fused projections share.
    def order_of(inputs: int) -> np.ndarray:
        groups = np.arange(inputs) // (inputs if group == -1 else group)
        return np.random.default_rng(inputs).permutation(groups) if shuffled else groups

    def pack(rng: Random, outputs: int, inputs: int) -> tuple[dict[str, Tensor], np.ndarray]:
        size = inputs if group == -1 else group
        codes, scales, zeros = draw(rng, bits, outputs, inputs, inputs // size, symmetric)
        g_idx = order_of(inputs)
        stored = zeros if v2 else (zeros - 1) % (1 << bits)
        parts = {
            "qweight": words(codes, bits).T,
            "qzeros": words(stored.T, bits),
            "scales": torch.from_numpy(scales.T.copy()),
            "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
            "bias": torch.zeros(outputs, dtype=torch.float16),  # as AutoGPTQ writes them
        }
        return parts, numbers_of(codes, scales, zeros, g_idx)

    return pack


def packed_integers(
    bits: int, group: int | None, *, symmetric: bool, shuffled: bool = False
) -> Packer:
    """compressed-tensors' pack-quantized."""

    def pack(rng: Random, outputs: int, inputs: int) -> tuple[dict[str, Tensor], np.ndarray]:
        size = group or inputs
        codes, scales, zeros = draw(rng, bits, outputs, inputs, inputs // size, symmetric)
        g_idx = np.arange(inputs) // size
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": torch.from_numpy(scales).bfloat16(),
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        scales = parts["weight_scale"].float().numpy()
        if shuffled:
            g_idx = np.random.default_rng(inputs).permutation(g_idx)
            parts["weight_g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
        if not symmetric:
            parts["weight_zero_point"] = words(zeros.T, bits).T
        return parts, numbers_of(codes, scales, zeros, g_idx)

    return pack


def bytes_of_integers(rng: Random, outputs: int, inputs: int) -> tuple[dict[str, Tensor], Any]:
    """compressed-tensors' int-quantized, a scale a row."""
    codes = rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    scales = rng.uniform(0.5, 2.0, (outputs, 1)).astype(np.float32) / 256 / inputs**0.5
    parts = {"weight": torch.from_numpy(codes), "weight_scale": torch.from_numpy(scales)}
    return parts, codes * scales


def fp8(block: int | None, scale: str, per_row: bool = False) -> Packer:
    """scale: the suffix of the scales."""

    def pack(rng: Random, outputs: int, inputs: int) -> tuple[dict[str, Tensor], np.ndarray]:
        codes = torch.from_numpy(rng.uniform(-448, 448, (outputs, inputs))).to(torch.float8_e4m3fn)
        shape = (outputs, 1) if per_row else (1,)
        if block is not None:
            shape = (-(-outputs // block), -(-inputs // block))
        scales = rng.uniform(0.5, 2.0, shape).astype(np.float32) / 448 / inputs**0.5
        numbers = codes.float().numpy().copy()
        for i in range(outputs):
            row = scales[i // block if block else i if per_row else 0]
            numbers[i] *= row[np.arange(inputs) // block] if block else row
        return {"weight": codes, scale: torch.from_numpy(scales)}, numbers

    return pack
