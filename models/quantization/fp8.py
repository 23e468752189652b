"""fp8 e4m3 weights as DeepSeek-V3, Qwen3 and others publish them (quant_method `fp8`).

    weight            [out, in] float8_e4m3fn
    weight_scale_inv  [out / 128, in / 128]    the scale of each block, rounded up
    weight_scale      one number               instead, where there are no blocks

A number is code times scale, whatever the names say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.linear.formats import FP8, Fp8Format, QuantizedWeight
from models.quantization.layout import checked, group_size


@dataclass(frozen=True, slots=True)
class Fp8:
    block: tuple[int, int] | None  # outputs, inputs; None: one scale for the matrix

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Fp8:
        """Raises ValueError, a clause."""
        scheme, fmt = config.get("activation_scheme", "dynamic"), config.get("fmt", "e4m3")
        if scheme != "dynamic" or fmt != "e4m3":
            raise ValueError(f"fp8 weights of format {fmt} with {scheme} activation scales")
        block = config.get("weight_block_size")
        return cls(None if block is None else block_of(block))

    @property
    def marker(self) -> str:
        return "weight_scale" if self.block is None else "weight_scale_inv"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("weight", self.marker)

    @property
    def optional(self) -> tuple[str, ...]:
        return ()

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedWeight:
        """See `Layout.read`."""
        codes = checked(tensors["weight"], "weight", outputs, inputs)
        return fp8_weight(codes, tensors[self.marker], self.block)


def block_of(value: Any) -> tuple[int, int]:
    """Outputs and inputs of a block. Raises ValueError, a clause."""
    tall, wide = (group_size(number) for number in value)
    if tall is None or wide is None:
        raise ValueError(f"fp8 weights in blocks of {value}")
    return tall, wide


def fp8_weight(codes: Tensor, scales: Tensor, block: tuple[int, int] | None) -> QuantizedWeight:
    """codes: [out, in]; scales: of blocks, or one number, or one for each row.

    Every row gets its own scales, whatever it shares them with, so that projections of any sizes
    can be fused. Raises ValueError.
    """
    if codes.dtype != FP8:
        raise ValueError(f"weight is of {codes.dtype}, not of {FP8}")
    outputs, inputs = codes.shape
    if block is None:
        rows = scales.reshape(-1, 1)
        if rows.shape[0] not in (1, outputs):
            raise ValueError(f"{rows.shape[0]} scales for {outputs} outputs")
        return Fp8Format(None).weight(codes, rows.expand(outputs, 1).float())
    tall, wide = block
    checked(scales, "the scales", -(-outputs // tall), -(-inputs // wide))
    rows = scales.repeat_interleave(tall, 0)[:outputs]
    return Fp8Format(wide).weight(codes, rows.float())
