"""`Sealed`: pages of two bits that are encoded when they are full, keys channel by channel.

Channels of keys differ more than tokens do, which groups along tokens use; what tokens differ by,
their norm, is taken out before (OScaR, arXiv 2605.19660). Other than there, norms are of one head
each, so that heads can live on different devices, and groups have values in the middles of their
cells (see `Affine`).

A page's codes depend on all of its tokens. Until the last one comes they are read dense, which
`Windows` do already: with blocks of whole pages, a page is read packed by later blocks alone. All
of a page's dense copies are there when its last position is written, since sequences begin at
multiples of the block, behind a cached prefix too, and copies of a block are kept until it is full.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from kernels.kv import dense
from kernels.kv.codec import LARGEST, Affine, Code, root, squares
from kernels.kv.turned import Turned
from kernels.kv.windows import DensePages, Windows


class SealedPage:
    """The code of a page of [kv_heads, page_size, head_dim], keys and values turned. In bytes:

    keys' codes [kv_heads, head_dim, page_size / 4] | values' [kv_heads, page_size, head_dim / 4]
    | norms of keys [kv_heads, page_size] fp16 | keys' scales and zeros [kv_heads, head_dim, ·] fp16
    | values' scales and zeros [kv_heads, page_size, ·] fp16
    """

    def __init__(self, kv_heads: int, page_size: int, head_dim: int, group: int = 32) -> None:
        """group: tokens of a channel of keys, or channels of a value, that share a scale.

        Raises ValueError for pages and heads that do not make such groups."""
        self.codec = Affine(2, group)
        along, across = self.codec.sizes(page_size), self.codec.sizes(head_dim)
        self.codes = (  # what the codes of keys and of values are shaped like
            (kv_heads, head_dim, along.high),
            (kv_heads, page_size, across.high),
        )
        self.numbers = (
            (kv_heads, page_size, 1),
            (kv_heads, head_dim, along.numbers),
            (kv_heads, page_size, across.numbers),
        )

    @property
    def starts(self) -> tuple[int, int, int, int]:
        """Where the values' codes begin, the norms, the keys' scales and zeros, the values'."""
        key_codes, value_codes = (torch.Size(shape).numel() for shape in self.codes)
        norms, of_keys, _ = (2 * torch.Size(shape).numel() for shape in self.numbers)
        split = key_codes + value_codes
        return key_codes, split, split + norms, split + norms + of_keys

    @property
    def bytes(self) -> int:
        codes = sum(torch.Size(shape).numel() for shape in self.codes)
        return codes + 2 * sum(torch.Size(shape).numel() for shape in self.numbers)

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """k, v: [..., kv_heads, page_size, head_dim] -> [..., bytes] uint8."""
        k, v = k.float(), v.float()
        norm = root(squares(k)).clamp(max=LARGEST).half()
        # Divided by what will be read. A norm too small for 16 bits is zero, and so is its key.
        unit = torch.where(norm > 0, k / norm.float(), 0.0)
        key, value = self.codec.encode(unit.transpose(-1, -2)), self.codec.encode(v)
        numbers = (norm, key.numbers, value.numbers)
        halves = torch.cat([part.flatten(-3) for part in numbers], dim=-1)
        codes = torch.cat([key.high.flatten(-3), value.high.flatten(-3)], dim=-1)
        return torch.cat([codes, halves.view(torch.uint8)], dim=-1)

    def decode(self, page: Tensor) -> tuple[Tensor, Tensor]:
        """page: [..., bytes] uint8 -> keys and values [..., kv_heads, page_size, head_dim] fp32."""
        split = sum(torch.Size(shape).numel() for shape in self.codes)
        # Copied: the bytes need not lie at an even address.
        halves = page[..., split:].clone(memory_format=torch.contiguous_format)
        key_codes, value_codes = _split(page[..., :split], self.codes)
        norm, of_keys, of_values = _split(halves.view(torch.float16), self.numbers)
        unit = self.codec.decode(Code(key_codes, key_codes[..., :0], of_keys))
        values = self.codec.decode(Code(value_codes, value_codes[..., :0], of_values))
        return unit.transpose(-1, -2) * norm.float(), values


class Sealed(Turned):
    """Pages by `SealedPage`, and dense copies of what is not sealed yet."""

    def __init__(
        self,
        kv_heads: int,
        page_size: int,
        head_dim: int,
        windows: Windows,
        *,
        group: int = 32,
        key_mean: Tensor | None = None,
    ) -> None:
        """group: see `SealedPage`. key_mean: see `Turned`. Raises ValueError for heads and pages
        that do not make groups, and for windows whose blocks are not whole pages."""
        super().__init__(head_dim, rotated=True, key_mean=key_mean)
        if not windows.block or windows.block % page_size:
            raise ValueError(f"blocks of {windows.block} tokens are no pages of {page_size}")
        self.windows = windows
        self.page = SealedPage(kv_heads, page_size, head_dim, group)
        self.shape = (kv_heads, page_size, head_dim)

    @property
    def name(self) -> str:
        return f"sealed-{self.page.codec.name}{self.turning}{self.windows.name}"

    def page_shape(self, kv_heads: int, page_size: int, head_dim: int) -> tuple[int, ...]:
        if (kv_heads, page_size, head_dim) != self.shape:
            raise ValueError(f"made for heads, page size and head size {self.shape}")
        return (self.page.bytes,)

    def pool_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.uint8

    def page_size(self, kv: Tensor) -> int:
        return self.shape[1]

    def append(
        self,
        k: Tensor,
        v: Tensor,
        kv: Tensor,
        kv_slots: Tensor,
        copies: DensePages | None = None,
    ) -> None:
        """Pages whose last position is among the tokens are sealed, as they are now: once more, if
        what was written there before was a draft. The null page is not: nobody reads it."""
        assert copies is not None
        pool, size = self.dense(kv, copies.count, k.dtype), self.shape[1]
        dense.append(*self.turned(k, v), pool, copies.slots)
        last = (kv_slots % size == size - 1) & (kv_slots >= size)
        ends = last.nonzero().flatten()
        whole = pool[copies.slots[ends] // size]
        kv[kv_slots[ends] // size] = self.page.encode(whole[:, 0], whole[:, 1])

    def gather(self, kv: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.page.decode(kv[pages])
        return keys.transpose(1, 2).flatten(2, 3), values.transpose(1, 2).flatten(2, 3)

    def dense(self, kv: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        return dense.behind(kv, count, *self.shape, dtype)

    def coarse(self) -> NoReturn:
        """Raises ValueError: a page that is not sealed can only be read dense."""
        raise ValueError(f"pages of {self.name} are not read without their dense windows")


def _split(flat: Tensor, shapes: tuple[tuple[int, int, int], ...]) -> list[Tensor]:
    """flat: [..., numbers of all shapes together] -> one tensor of each shape."""
    parts = flat.split([torch.Size(shape).numel() for shape in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]
