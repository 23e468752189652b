"""`SealedPage`: keys and values of a whole page in two bits, keys channel by channel.

A plain reference, not a `KVFormat`: a page's codes depend on all of its tokens, so it can be made
only of a full page that nobody will write to again. Channels of keys differ more than tokens do,
which groups along tokens use; what tokens differ by, their norm, is taken out before (OScaR, arXiv
2605.19660). Other than there, norms are of one head each, so that heads can live on different
devices, and groups have values in the middles of their cells (see `Affine`).

Keys and values come rotated already, like those of `Paged` inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv.codec import LARGEST, Affine, Code


class SealedPage:
    """Pages of [kv_heads, page_size, head_dim]. In bytes:

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
    def bytes(self) -> int:
        codes = sum(torch.Size(shape).numel() for shape in self.codes)
        return codes + 2 * sum(torch.Size(shape).numel() for shape in self.numbers)

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """k, v: [..., kv_heads, page_size, head_dim] -> [..., bytes] uint8."""
        k, v = k.float(), v.float()
        norm = k.square().sum(-1, keepdim=True).sqrt().clamp(max=LARGEST).half()
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


def _split(flat: Tensor, shapes: tuple[tuple[int, int, int], ...]) -> list[Tensor]:
    """flat: [..., numbers of all shapes together] -> one tensor of each shape."""
    parts = flat.split([torch.Size(shape).numel() for shape in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]
