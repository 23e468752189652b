"""int6, in a layout of our own, for no other engine has one: quant_method `foresight`.

    weight_low    [out, in / 2] uint8    the lower four bits of each code
    weight_high   [out, in / 4] uint8    the upper two
    weight_scale  [out, in / group] bf16

A number is (code - 32) * scale. The bytes of a group of inputs lie together: of g inputs, byte j of
the group's g / 2 in `weight_low` has those of inputs j and j + g / 2, the former in its low half;
byte j of its g / 4 in `weight_high` those of inputs j, j + g / 4, j + g / 2 and j + 3 g / 4, from
the lowest bits on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.linear.formats import IntFormat, QuantizedWeight
from models.quantization.layout import checked, group_size

METHOD, FORMAT = "foresight", "int6"


@dataclass(frozen=True, slots=True)
class SixBits:
    group: int
    marker: str = "weight_low"
    suffixes: tuple[str, ...] = ("weight_low", "weight_high", "weight_scale")
    optional: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> SixBits:
        """Raises ValueError, a clause."""
        if config.get("format") != FORMAT:
            raise ValueError(f"{METHOD} weights of format {config.get('format')}")
        group = group_size(config["group_size"])
        if group is None:
            raise ValueError(f"{METHOD} weights of 6 bits with a scale a row")
        return cls(group)

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedWeight:
        """See `Layout.read`."""
        low = checked(tensors["weight_low"], "weight_low", outputs, inputs // 2)
        high = checked(tensors["weight_high"], "weight_high", outputs, inputs // 4)
        scales = checked(tensors["weight_scale"], "weight_scale", outputs, inputs // self.group)
        return QuantizedWeight(IntFormat(6, self.group), inputs, (low, high), scales)

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See `WritableLayout.write`."""
        low, high = weight.planes
        return {"weight_low": low, "weight_high": high, "weight_scale": weight.scales}

    def config(self, ignored: Sequence[str]) -> dict[str, Any]:
        """See `WritableLayout.config`."""
        return {
            "quant_method": METHOD,
            "format": FORMAT,
            "group_size": self.group,
            "ignore": list(ignored),
        }
