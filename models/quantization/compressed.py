"""compressed-tensors (vLLM's llm-compressor): `pack-quantized`, `int-quantized`, `float-quantized`.

    weight_packed      [out, ceil(in * bits / 32)] int32      codes, the lowest bits of a word first
    weight_scale       [out, groups] or one number
    weight_zero_point  [ceil(out * bits / 32), groups] int32  packed along outputs; if asymmetric
    weight_shape       [2] int64
    weight_g_idx       [in] int32                             each input's group, with act-order

Codes and zero points are signed, plus 2**(bits - 1). Where a byte holds a number (`int-quantized`,
`float-quantized`), `weight` [out, in] int8 or float8_e4m3fn takes the place of `weight_packed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.linear.formats import Fp8Format, IntFormat, QuantizedWeight
from models.quantization.fp8 import block_of, fp8_weight
from models.quantization.layout import (
    checked,
    group_order,
    group_size,
    pack_words,
    repeated,
    unpack_words,
    whole_row_group,
)

METHOD = "compressed-tensors"


@dataclass(frozen=True, slots=True)
class PackedIntegers:
    """`pack-quantized`, and `int-quantized` where `packed` is false."""

    bits: int
    group: int | None  # None: a scale a row
    symmetric: bool = True
    packed: bool = True

    @property
    def marker(self) -> str:
        # Dense layers have a `weight` too, but no scale.
        return "weight_packed" if self.packed else "weight_scale"

    @property
    def suffixes(self) -> tuple[str, ...]:
        zeros = () if self.symmetric else ("weight_zero_point",)
        return ("weight_packed" if self.packed else "weight", "weight_scale", *zeros)

    @property
    def optional(self) -> tuple[str, ...]:
        return ("weight_shape", "weight_g_idx")

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedWeight:
        """See `Layout.read`."""
        a_word, middle = 32 // self.bits, 1 << (self.bits - 1)
        group = self.group or whole_row_group(self.bits, inputs)
        groups = 1 if self.group is None else inputs // self.group
        if self.packed:
            packed = tensors["weight_packed"]
            words = checked(packed, "weight_packed", outputs, -(-inputs // a_word))
            codes = unpack_words(words, self.bits)[:, :inputs]
        else:
            codes = _unsigned(checked(tensors["weight"], "weight", outputs, inputs), middle)
        scales = tensors["weight_scale"]
        if scales.numel() == 1:
            scales = scales.reshape(1, 1).expand(outputs, groups)
        checked(scales, "weight_scale", outputs, groups)
        zeros = None
        if not self.symmetric:
            zeros = tensors["weight_zero_point"]
            if zeros.dtype == torch.int32:
                words = checked(zeros, "weight_zero_point", -(-outputs // a_word), groups)
                zeros = unpack_words(words.t(), self.bits)[:, :outputs].t()
            else:
                zeros = _unsigned(checked(zeros, "weight_zero_point", outputs, groups), middle)
            zeros = repeated(zeros, group, inputs)
        scales = repeated(scales, group, inputs)
        order = group_order(tensors.get("weight_g_idx"), self.group, inputs)
        if order is not None:
            codes = codes[:, order]
        return IntFormat(self.bits, group, not self.symmetric).weight(codes, scales, zeros, order)

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See `WritableLayout.write`; of symmetric formats."""
        assert isinstance(weight.form, IntFormat)
        return {
            "weight_packed": pack_words(weight.form.codes(weight), self.bits),
            "weight_scale": weight.scales,
            "weight_shape": torch.tensor([weight.outputs, weight.inputs]),
        }

    def config(self, ignored: Sequence[str]) -> dict[str, Any]:
        """See `WritableLayout.config`."""
        strategy = {"strategy": "channel"}
        grouped = {"strategy": "group", "group_size": self.group}
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "dynamic": False,
            **(strategy if self.group is None else grouped),
        }
        return _config("pack-quantized", weights, None, ignored)


@dataclass(frozen=True, slots=True)
class FloatQuantized:
    """fp8, scaled by blocks or by rows, or as a whole."""

    block: tuple[int, int] | None = None
    marker: str = "weight_scale"
    suffixes: tuple[str, ...] = ("weight", "weight_scale")
    optional: tuple[str, ...] = ()

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedWeight:
        """See `Layout.read`."""
        codes = checked(tensors["weight"], "weight", outputs, inputs)
        return fp8_weight(codes, tensors["weight_scale"], self.block)

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See `WritableLayout.write`; of a scale a row."""
        assert weight.form == Fp8Format(None)
        return {"weight": weight.planes[0], "weight_scale": weight.scales}

    def config(self, ignored: Sequence[str]) -> dict[str, Any]:
        """See `WritableLayout.config`."""
        numbers = {"num_bits": 8, "type": "float", "symmetric": True}
        weights = {**numbers, "strategy": "channel", "dynamic": False}
        activations = {**numbers, "strategy": "token", "dynamic": True}
        return _config("float-quantized", weights, activations, ignored)


def layout_of(config: Mapping[str, Any]) -> PackedIntegers | FloatQuantized:
    """Raises ValueError, a clause."""
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise ValueError(f"{METHOD} weights in {len(groups)} groups of different formats")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise ValueError(f"{METHOD} weights that are sparse ({sparsity})")
    (group,) = groups
    form = group.get("format") or config.get("format")
    weights = group.get("weights") or {}
    if (group.get("input_activations") or {"dynamic": True}).get("dynamic") is not True:
        raise ValueError(f"{METHOD} weights with static activation scales")
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    what = f"{METHOD} weights of format {form}, {kind} of {bits} bits by {strategy}"
    if form == "pack-quantized" and kind == "int" and bits in (4, 8):
        if strategy in ("group", "channel"):
            size = group_size(weights["group_size"]) if strategy == "group" else None
            return PackedIntegers(bits, size, bool(weights.get("symmetric", True)))
    elif form == "int-quantized" and kind == "int" and bits == 8:
        if strategy in ("channel", "tensor"):
            return PackedIntegers(8, None, bool(weights.get("symmetric", True)), packed=False)
    elif form == "float-quantized" and kind == "float" and bits == 8:
        if strategy in ("channel", "tensor"):
            return FloatQuantized()
        if strategy == "block":
            return FloatQuantized(block_of(weights["block_structure"]))
    raise ValueError(what)


def _unsigned(numbers: Tensor, middle: int) -> Tensor:
    """int8 -> uint8."""
    return (numbers.to(torch.int16) + middle).to(torch.uint8)


def _config(
    form: str,
    weights: dict[str, Any],
    activations: dict[str, Any] | None,
    ignored: Sequence[str],
) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": METHOD,
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }
