"""Number formats of weights in few bits, in plain torch: what the kernels are measured by.

A matrix [out, in] is cut into groups of inputs. Each output's group has a scale, and perhaps a zero
point of its own; its numbers are codes:

    value = (code - zero) * scale        codes 0 .. 2**bits - 1, zero 2**(bits - 1) if symmetric
    value = code * scale                 codes of fp8 e4m3

Codes lie in planes of bytes, packed group by group by `kernels.kv.pack`: a byte's parts belong to
equally long runs of a group's inputs, so that a kernel multiplies run after run without shuffling.
Six bits are a plane of four and a plane of two, as in FlexQ (arXiv 2508.04405), so that both are
whole parts of a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kernels.kv.pack import pack, unpack

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# Of matrices quantised here. As checkpoints keep them, so that one read back is the same.
SCALE_DTYPE = torch.bfloat16


class WeightFormat(Protocol):
    """How codes and scales make numbers."""

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; None: all of them."""
        ...

    @property
    def name(self) -> str: ...

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """weight: [out, in] of any floating dtype; rounded to the nearest code, in fp32.

        Raises ValueError, a sentence, for a number of inputs that the groups do not divide.
        """
        ...

    def values(self, weight: QuantizedWeight) -> Tensor:
        """[out, in] fp32, in the order of the stored columns."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A matrix [out, in] of a format."""

    form: WeightFormat
    inputs: int
    planes: tuple[Tensor, ...]  # [out, bytes] uint8 each; fp8: [out, in] of that dtype
    scales: Tensor  # [out, groups], floating
    zeros: Tensor | None = None  # [out, groups] uint8: the code that stands for nought
    order: Tensor | None = None  # [in] int64: the input that stored column j belongs to

    @property
    def outputs(self) -> int:
        return self.scales.shape[0]

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Some of the outputs, as views."""
        return replace(
            self,
            planes=tuple(plane[start:stop] for plane in self.planes),
            scales=self.scales[start:stop],
            zeros=None if self.zeros is None else self.zeros[start:stop],
        )

    def dequantize(self) -> Tensor:
        """[out, in] fp32, in the order of the inputs."""
        stored = self.form.values(self)
        if self.order is None:
            return stored
        found = torch.empty_like(stored)
        found[:, self.order] = stored
        return found


@dataclass(frozen=True, slots=True)
class IntFormat:
    """Integers of 8, 6 or 4 bits. Fewer than 8 need groups, of a multiple of 8 inputs."""

    bits: int
    group: int | None
    zero_point: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 6, 8):
            raise ValueError(f"weights of {self.bits} bits are not among 4, 6 and 8")
        if self.bits < 8 and (self.group is None or self.group % 8):
            raise ValueError(f"{self.bits} bits need groups of a multiple of 8 inputs")

    @property
    def name(self) -> str:
        group = "" if self.group is None else f" in groups of {self.group}"
        return f"int{self.bits}{group}{' with zero points' if self.zero_point else ''}"

    @property
    def middle(self) -> int:
        """The code that stands for nought where there is no zero point."""
        return 1 << (self.bits - 1)

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """As `WeightFormat.quantize`. Scales are `SCALE_DTYPE`, and codes know of their rounding.

        No number is off by more than half a step (and what the scale's rounding adds): symmetric
        steps are such that the largest number lies half a step beyond the largest code.
        """
        grouped = _grouped(weight, self.group)
        most = (1 << self.bits) - 1
        if self.zero_point:
            low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
            scales = _no_zeros((high - low) / most).to(SCALE_DTYPE)
            zeros = (-low / scales.float()).round().clamp(0, most)
        else:
            scales = _no_zeros(grouped.abs().amax(-1) / (most / 2)).to(SCALE_DTYPE)
            zeros = torch.full_like(scales, self.middle, dtype=torch.float32)
        codes = (grouped / scales.float()[..., None]).round() + zeros[..., None]
        return self.weight(
            codes.clamp(0, most).to(torch.uint8).flatten(1),
            scales,
            zeros.to(torch.uint8) if self.zero_point else None,
        )

    def weight(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        order: Tensor | None = None,
    ) -> QuantizedWeight:
        """codes: [out, in] uint8; the rest as `QuantizedWeight` has it. Raises ValueError."""
        outputs, inputs = codes.shape
        if scales.shape != (outputs, groups_of(inputs, self.group)):
            raise ValueError(f"scales of shape {list(scales.shape)} do not fit {self.name}")
        if self.bits == 8:
            planes: tuple[Tensor, ...] = (codes.contiguous(),)
        else:
            assert self.group is not None
            if inputs % self.group:
                raise ValueError(f"{inputs} inputs are not whole groups of {self.group}")
            grouped = codes.unflatten(1, (-1, self.group))
            planes = (pack(grouped & 15, 4).flatten(1).contiguous(),)
            if self.bits == 6:
                planes += (pack(grouped >> 4, 2).flatten(1).contiguous(),)
        zeros = None if zeros is None else zeros.contiguous()
        return QuantizedWeight(self, inputs, planes, scales.contiguous(), zeros, order)

    def codes(self, weight: QuantizedWeight) -> Tensor:
        """[out, in] uint8, in the order of the stored columns."""
        if self.bits == 8:
            return weight.planes[0]
        groups = weight.scales.shape[1]
        codes = unpack(weight.planes[0].unflatten(1, (groups, -1)), 4)
        if self.bits == 6:
            codes = codes | unpack(weight.planes[1].unflatten(1, (groups, -1)), 2) << 4
        return codes.flatten(1)

    def values(self, weight: QuantizedWeight) -> Tensor:
        codes = self.codes(weight).float()
        if weight.zeros is None:
            codes -= self.middle
        else:
            codes -= _spread(weight.zeros.float(), self.group, weight.inputs)
        return codes * _spread(weight.scales.float(), self.group, weight.inputs)


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """fp8 e4m3. `group`: inputs of a block; None: a scale for the whole row."""

    group: int | None

    @property
    def name(self) -> str:
        return "fp8" if self.group is None else f"fp8 in blocks of {self.group}"

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """As `WeightFormat.quantize`. Scales are fp32."""
        grouped = _grouped(weight, self.group)
        scales = _no_zeros(grouped.abs().amax(-1) / FP8_MAX)
        codes = (grouped / scales[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        return self.weight(codes.flatten(1), scales)

    def weight(self, codes: Tensor, scales: Tensor) -> QuantizedWeight:
        """codes: [out, in] of fp8; scales: [out, groups] floating. Raises ValueError."""
        outputs, inputs = codes.shape
        if scales.shape != (outputs, groups_of(inputs, self.group)):
            raise ValueError(f"scales of shape {list(scales.shape)} do not fit {self.name}")
        return QuantizedWeight(self, inputs, (codes.contiguous(),), scales.contiguous())

    def values(self, weight: QuantizedWeight) -> Tensor:
        codes = weight.planes[0].float()
        return codes * _spread(weight.scales.float(), self.group, weight.inputs)


def groups_of(inputs: int, group: int | None) -> int:
    """Of a row; the last may be shorter."""
    return 1 if group is None else -(-inputs // group)


def join(parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """Matrices of the same inputs as one, their outputs one after another; None if they differ in
    more than their numbers."""
    first, *others = parts
    if not others:
        return first
    for part in others:
        same_order = (part.order is None) == (first.order is None) and (
            part.order is None or first.order is None or torch.equal(part.order, first.order)
        )
        if (
            part.form != first.form
            or part.inputs != first.inputs
            or part.scales.dtype != first.scales.dtype
            or not same_order
        ):
            return None
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return replace(
        first,
        planes=tuple(torch.cat(planes) for planes in zip(*(p.planes for p in parts), strict=True)),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat(zeros) if zeros else None,
    )


def _grouped(weight: Tensor, group: int | None) -> Tensor:
    """[out, groups, group] fp32."""
    if group is None:
        return weight.float()[:, None]
    if weight.shape[1] % group:
        raise ValueError(f"{weight.shape[1]} inputs are not whole groups of {group}")
    return weight.float().unflatten(1, (-1, group))


def _spread(numbers: Tensor, group: int | None, inputs: int) -> Tensor:
    """[out, groups] -> [out, inputs], or [out, 1] where the row has one."""
    return numbers if group is None else numbers.repeat_interleave(group, 1)[:, :inputs]


def _no_zeros(scales: Tensor) -> Tensor:
    """Of a group of zeros; any scale does."""
    return torch.where(scales > 0, scales, 1.0)
