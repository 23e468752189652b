"""`Paged`: pages of codes, one codec for keys and one for values.

A page of one layer holds, one behind the other and each [kv_heads, page_size, bytes],

    the keys' high plane, the values', the numbers, the keys' low plane, the values',

so that what a coarse reading needs lies together. The numbers of a position are the key's, then the
value's.

Where pages can be demoted, there is room for other numbers behind the low planes. Such a page is
two halves of one layout, and either can be a page by itself: high planes and numbers, to be read
coarsely. So nothing is encoded again when a page is demoted. An entry e of a page table is the
whole page e, or, if it is negative, half ~e % 2 of page ~e // 2; appends go to whole pages alone.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.kv import dense
from kernels.kv.codec import Code, Codec, Sizes
from kernels.kv.scales import HeadScales
from kernels.kv.turned import Turned
from kernels.kv.windows import DensePages, Windows


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in a page of `bytes`."""

    kv_heads: int
    page_size: int
    keys: Sizes
    values: Sizes
    halves: bool = False  # pages can be demoted

    def __post_init__(self) -> None:
        low = (self.keys.low, self.values.low)
        if self.halves and low != (self.keys.high, self.values.high):
            raise ValueError("only pages whose keys and values have 8 bits are two halves of 4")

    @property
    def positions(self) -> int:
        return self.kv_heads * self.page_size

    @property
    def starts(self) -> tuple[int, int, int, int, int, int]:
        """Of the keys' high plane, the values', the numbers, the keys' low plane, the values', and
        the end."""
        sizes = (
            self.keys.high,
            self.values.high,
            2 * (self.keys.numbers + self.values.numbers),
            self.keys.low,
            self.values.low,
        )
        found = [0]
        for size in sizes:
            found.append(found[-1] + self.positions * size)
        return (found[0], found[1], found[2], found[3], found[4], found[5])

    @property
    def bytes(self) -> int:
        return 2 * self.half_bytes if self.halves else self.starts[5]

    @property
    def half_bytes(self) -> int:
        """Of what a coarse reading needs."""
        return self.starts[3]


class Paged(Turned):
    """Keys and values by their codecs, rotated where the preset says so."""

    def __init__(
        self,
        kv_heads: int,
        page_size: int,
        head_dim: int,
        keys: Codec,
        values: Codec,
        *,
        rotated: bool,
        key_mean: Tensor | None = None,
        windows: Windows | None = None,
        halves: bool = False,
        scales: HeadScales | None = None,
    ) -> None:
        """rotated, key_mean: see `Turned`. halves: pages can be demoted. scales: [kv_heads], of
        what is encoded. Raises ValueError for heads that a codec does not take, for halves of what
        is not two of them, and for scales of codes that have their own."""
        sizes = keys.sizes(head_dim), values.sizes(head_dim)
        if scales is not None and any(size.numbers for size in sizes):
            raise ValueError(f"codes of {keys.name} and {values.name} have scales of their own")
        self.layout = Layout(kv_heads, page_size, *sizes, halves)
        page = self.layout.half_bytes if halves else self.layout.bytes
        if page % 4 or self.layout.starts[2] % 4:  # numbers are read in pairs
            raise ValueError(f"pages of {page} bytes would not keep numbers aligned")
        super().__init__(head_dim, rotated=rotated, key_mean=key_mean)
        self.keys, self.values = keys, values
        self.windows = windows
        self.scales = scales
        self.reads_coarsely = False
        self._scales_on: dict[torch.device, Tensor] = {}

    @property
    def name(self) -> str:
        scales = "" if self.scales is None else self.scales.name
        windows = "" if self.windows is None else self.windows.name
        halves = "h" if self.layout.halves else ""
        return f"{self.keys.name}-{self.values.name}{self.turning}{scales}{windows}{halves}"

    def page_shape(self, kv_heads: int, page_size: int, head_dim: int) -> tuple[int, ...]:
        made_for = (self.layout.kv_heads, self.layout.page_size, self.head_dim)
        if (kv_heads, page_size, head_dim) != made_for:
            raise ValueError(f"made for heads, page size and head size {made_for}")
        return (self.layout.bytes,)

    def pool_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.uint8

    def page_size(self, kv: Tensor) -> int:
        return self.layout.page_size

    def append(
        self,
        k: Tensor,
        v: Tensor,
        kv: Tensor,
        kv_slots: Tensor,
        copies: DensePages | None = None,
    ) -> None:
        dtype = k.dtype
        k, v = self.turned(k, v)
        if self.windows is not None:
            assert copies is not None
            dense.append(k, v, self.dense(kv, copies.count, dtype), copies.slots)
        if self.scales is not None:
            scales = self.scales_on(k.device)
            k, v = k / scales[0], v / scales[1]
        key, value = self.keys.encode(k), self.values.encode(v)
        pages = torch.div(kv_slots, self.layout.page_size, rounding_mode="floor")
        offsets = kv_slots - pages * self.layout.page_size
        numbers = torch.cat([key.numbers, value.numbers], dim=-1)
        found = (key.high, value.high, numbers, key.low, value.low)
        for plane, code in zip(self._planes(kv), found, strict=True):
            if plane.shape[-1]:
                plane[pages, :, offsets] = code

    def scales_on(self, device: torch.device) -> Tensor:
        """[2, kv_heads, 1] fp32 there, of keys and of values: copied once, as the mean is."""
        assert self.scales is not None
        if device not in self._scales_on:
            exponents = torch.stack([self.scales.keys, self.scales.values])
            self._scales_on[device] = exponents.double().exp2().float()[..., None].to(device)
        return self._scales_on[device]

    def gather(self, kv: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        return self.read(kv, pages, self.reads_coarsely)

    def read(self, kv: Tensor, pages: Tensor, coarse: bool = False) -> tuple[Tensor, Tensor]:
        """As `gather`; `coarse`: by the high planes alone."""
        if self.layout.halves:
            return self._read_halves(kv, pages, coarse)
        return self._read(kv, pages, coarse)

    def _read(self, kv: Tensor, pages: Tensor, coarse: bool) -> tuple[Tensor, Tensor]:
        key_high, value_high, numbers, key_low, value_low = (
            plane[pages].transpose(1, 2).flatten(2, 3) for plane in self._planes(kv)
        )
        of_key, of_value = numbers.split(
            [self.layout.keys.numbers, self.layout.values.numbers], dim=-1
        )
        keys = self.keys.decode(Code(key_high, key_low, of_key), coarse)
        values = self.values.decode(Code(value_high, value_low, of_value), coarse)
        if self.scales is not None:
            scales = self.scales_on(keys.device)[:, :, None]
            keys, values = keys * scales[0], values * scales[1]
        return keys, values

    def _read_halves(self, kv: Tensor, entries: Tensor, coarse: bool) -> tuple[Tensor, Tensor]:
        """As `read`, where entries may be halves: all of them coarsely, then whole pages finely."""
        demoted = entries < 0
        halves = torch.where(demoted, ~entries, 2 * entries)
        keys, values = self._read(kv.view(-1, self.layout.half_bytes), halves, coarse=True)
        if coarse:
            return keys, values
        fine_keys, fine_values = self._read(kv, entries.clamp(min=0), coarse=False)
        hidden = demoted.repeat_interleave(self.layout.page_size, 1)[:, None, :, None]
        return torch.where(hidden, keys, fine_keys), torch.where(hidden, values, fine_values)

    def dense(self, kv: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        layout = self.layout
        return dense.behind(kv, count, layout.kv_heads, layout.page_size, self.head_dim, dtype)

    def coarse(self) -> Paged:
        """Eight bits are read by their upper halves alone, fewer as they are; no windows."""
        other = copy(self)
        other.reads_coarsely, other.windows = True, None
        return other

    def _planes(self, kv: Tensor) -> tuple[Tensor, ...]:
        """Views of the pool, [pages, kv_heads, page_size, ·]; of one seen as halves, the low planes
        are empty."""
        starts, views = self.layout.starts, []
        for i in range(5):
            plane = kv[:, starts[i] : starts[i + 1]]
            if i == 2:
                plane = plane.view(torch.float16)
            size = plane.shape[1] // self.layout.positions
            views.append(plane.unflatten(1, (self.layout.kv_heads, self.layout.page_size, size)))
        return tuple(views)
