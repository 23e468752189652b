"""`Layout`: one way to store a quantised matrix, and what the ways have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.linear.formats import QuantizedWeight, groups_of

GROUPS = (128, 64, 32)  # inputs that share a scale, where that can be chosen


class Layout(Protocol):
    """Of the tensors NAME.SUFFIX that together are the weight of the linear layer NAME.

    Which layers are quantised is seen by their tensors, so the lists of a configuration that say so
    (ignore, modules_to_not_convert, dynamic) need no reading.
    """

    @property
    def marker(self) -> str:
        """The suffix that quantised layers have and no others."""
        ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the tensors that must be there."""
        ...

    @property
    def optional(self) -> tuple[str, ...]:
        """Of those that may be."""
        ...

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedWeight:
        """tensors: by suffix. The matrix [outputs, inputs], on their device.

        Raises ValueError, a clause without a full stop.
        """
        ...


class WritableLayout(Layout, Protocol):
    """One that checkpoints are made in, too."""

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors by suffix; the inverse of `read`."""
        ...

    def config(self, ignored: Sequence[str]) -> dict[str, Any]:
        """quantization_config of such a checkpoint. ignored: linear layers that are dense."""
        ...


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """words: [..., n] int32 -> [..., n * 32 / bits] uint8 codes, the lowest bits of a word first.

    bits: 4 or 8.
    """
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_words`; codes behind the end of the last word are nought."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (32 // bits)))
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes.contiguous().view(torch.int32)


def checked(tensor: Tensor, name: str, *shape: int) -> Tensor:
    """The tensor. Raises ValueError if it has another shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
    return tensor


def group_order(g_idx: Tensor | None, group: int | None, inputs: int) -> Tensor | None:
    """Inputs sorted by group, [in] int64; None if they are so already. Raises ValueError."""
    if g_idx is None or group is None:
        return None
    places = checked(g_idx, "g_idx", inputs).long()
    if torch.equal(places, torch.arange(inputs, device=places.device) // group):
        return None
    if places.min() < 0 or not (torch.bincount(places) == group).all():
        raise ValueError(f"g_idx does not give every group {group} inputs")
    return places.argsort(stable=True)


def group_size(value: Any) -> int | None:
    """As configurations have it: -1 is the whole row, None here. Raises ValueError, a clause."""
    if value == -1:
        return None
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"weights in groups of {value!r} inputs")
    return value


def whole_row_group(bits: int, inputs: int) -> int | None:
    """The group to keep a matrix in whose rows have one scale each.

    Packing goes by groups, so that for less than 8 bits the scale is repeated for several. Raises
    ValueError.
    """
    return None if bits == 8 else largest_group([inputs])


def repeated(numbers: Tensor, group: int | None, inputs: int) -> Tensor:
    """[out, groups], or [out, 1] where the row has one scale -> [out, groups]."""
    return numbers.expand(-1, groups_of(inputs, group))


def largest_group(inputs: Sequence[int]) -> int:
    """Of those that divide all of the numbers of inputs. Raises ValueError."""
    for group in GROUPS:
        if all(number % group == 0 for number in inputs):
            return group
    odd = next(number for number in inputs if number % GROUPS[-1])
    raise ValueError(f"{odd} inputs are not whole groups of {GROUPS[-1]}")
