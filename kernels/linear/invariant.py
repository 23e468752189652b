"""`InvariantLinear`: a row's result does not depend on the other rows of the call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of one product. Every call is cut into products of exactly this many rows, the last one
# filled up with zeros, so the library always takes the same path.
BLOCK_ROWS = 16


class InvariantLinear(nn.Module):
    """Bitwise the same row out for the same row in, alone or in any batch, at any place in it.

    Libraries choose the order of summation by the number of rows; fixing that number leaves one
    order. Over `PackedLinear` this was exact for every shape tried; torch's own product is so for
    outputs that are a multiple of 16, its remainder columns depend on the row's place. It costs a
    product of `BLOCK_ROWS` rows where there is a single one, and many calls where there are many.
    """

    def __init__(self, inner: nn.Module) -> None:
        """inner: a linear layer, called with [BLOCK_ROWS, in] only."""
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        flat = x.reshape(-1, x.shape[-1])
        rows = flat.shape[0]
        blocks = F.pad(flat, (0, 0, 0, -rows % BLOCK_ROWS)).split(BLOCK_ROWS)
        out = torch.cat([self.inner(block) for block in blocks])[:rows]
        return out.view(*x.shape[:-1], -1)
