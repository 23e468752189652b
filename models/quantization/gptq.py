"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) as AutoGPTQ and GPTQModel store it.

    qweight  [in * bits / 32, out] int32        codes, consecutive inputs in a word
    qzeros   [groups, out * bits / 32] int32    zero points, consecutive outputs in a word
    scales   [groups, out] fp16
    g_idx    [in] int32                         each input's group, if there is no simpler rule

The lowest bits of a word come first. Checkpoint format `gptq` stores zero points less one,
`gptq_v2` as they are. With act-order (desc_act) inputs of a group are not neighbours; we store the
columns by group, and layers turn to that order what they multiply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.linear.formats import IntFormat, QuantizedWeight
from models.quantization.layout import (
    checked,
    group_order,
    group_size,
    repeated,
    unpack_words,
    whole_row_group,
)


@dataclass(frozen=True, slots=True)
class Gptq:
    bits: int
    group: int | None  # None: a scale a row
    symmetric: bool
    zero_offset: int  # what stored zero points are too small by
    marker: str = "qweight"
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales")
    optional: tuple[str, ...] = ("g_idx",)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Gptq:
        """Raises ValueError, a clause."""
        bits, form = config.get("bits"), config.get("checkpoint_format") or "gptq"
        if config.get("is_marlin_format"):
            form = "marlin"
        if bits not in (4, 8) or form not in ("gptq", "gptq_v2"):
            raise ValueError(f"GPTQ weights of {bits} bits in checkpoint format {form!r}")
        if any(not name.startswith("-:") for name in config.get("dynamic") or ()):
            raise ValueError("GPTQ weights with other settings for some layers (dynamic)")
        return cls(
            bits,
            group_size(config.get("group_size", 128)),
            symmetric=bool(config.get("sym", True)),
            zero_offset=1 if form == "gptq" else 0,
        )

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedWeight:
        """See `Layout.read`."""
        group = self.group or whole_row_group(self.bits, inputs)
        groups, a_word = 1 if self.group is None else inputs // self.group, 32 // self.bits
        qweight = checked(tensors["qweight"], "qweight", inputs // a_word, outputs)
        qzeros = checked(tensors["qzeros"], "qzeros", groups, outputs // a_word)
        scales = checked(tensors["scales"], "scales", groups, outputs).t()
        codes = unpack_words(qweight.t(), self.bits)
        zeros = unpack_words(qzeros, self.bits).t()
        # A zero point of nought is stored as the largest number.
        zeros = (zeros + self.zero_offset) & ((1 << self.bits) - 1)
        scales, zeros = repeated(scales, group, inputs), repeated(zeros, group, inputs)
        order = group_order(tensors.get("g_idx"), self.group, inputs)
        if order is not None:
            codes = codes[:, order]
        plain = self.symmetric and bool((zeros == 1 << (self.bits - 1)).all())
        form = IntFormat(self.bits, group, zero_point=not plain)
        return form.weight(codes, scales, None if plain else zeros, order)
