"""AWQ (Lin et al. 2023, arXiv 2306.00978) as AutoAWQ stores it, version `gemm`.

    qweight  [in, out / 8] int32        codes, eight outputs a word
    qzeros   [groups, out / 8] int32    zero points, likewise
    scales   [groups, out] fp16

The eight outputs of a word lie in the order 0 2 4 6 1 3 5 7 from its lowest bits on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.linear.formats import IntFormat, QuantizedWeight
from models.quantization.layout import (
    checked,
    group_size,
    repeated,
    unpack_words,
    whole_row_group,
)

PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of outputs 0 to 7 in a word
BITS = 4


@dataclass(frozen=True, slots=True)
class Awq:
    group: int | None  # None: a scale a row
    marker: str = "qweight"
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales")
    optional: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Awq:
        """Raises ValueError, a clause."""
        bits = config.get("bits", config.get("w_bit"))
        version = str(config.get("version", "gemm")).lower()
        if bits != BITS or version != "gemm":
            raise ValueError(f"AWQ weights of {bits} bits in version {version!r}")
        return cls(group_size(config.get("group_size", config.get("q_group_size", 128))))

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedWeight:
        """See `Layout.read`."""
        group = self.group or whole_row_group(BITS, inputs)
        groups = 1 if self.group is None else inputs // self.group
        qweight = checked(tensors["qweight"], "qweight", inputs, outputs // 8)
        qzeros = checked(tensors["qzeros"], "qzeros", groups, outputs // 8)
        scales = checked(tensors["scales"], "scales", groups, outputs)
        return IntFormat(BITS, group, zero_point=True).weight(
            _natural(qweight).t(),
            repeated(scales.t(), group, inputs),
            repeated(_natural(qzeros).t(), group, inputs),
        )


def _natural(words: Tensor) -> Tensor:
    """[n, out / 8] int32 -> [n, out] uint8, outputs in their order."""
    return unpack_words(words, BITS).unflatten(1, (-1, 8))[..., PLACES].flatten(1)
