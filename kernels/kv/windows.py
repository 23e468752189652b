"""`Windows`: which positions attention reads dense although their pages are packed.

The first `sink` positions, which much attention falls on, and the latest: text is cut at multiples
of `block`, and a position reads those of its own block dense, all before it packed. So between one
and `block` of the latest positions are dense, as between two flushes of KIVI's residual (arXiv
2402.02750).

A window that slides, the last W positions of whatever is read, would be smoother, and could not be
joined to a cached prefix: dense keys of a layer come from what the layer below made of its own
window, so a model of L layers would have to compute L (W - 1) tokens again before its next token
was what it would have been. Nothing after the end of a block depends on dense keys before it but
the sinks', which depend on each other alone.

Dense copies lie behind the pages in the layer's own pool, in dense pages of their own numbers. They
are turned, and less the mean, as what is packed: one query meets both.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Windows:
    """Raises ValueError for less than nothing."""

    sink: int  # positions
    block: int  # positions; 0: a position does not even read itself dense

    def __post_init__(self) -> None:
        if self.sink < 0 or self.block < 0:
            raise ValueError(f"windows of {self.sink} and {self.block} tokens are less than none")

    @property
    def name(self) -> str:
        return f"s{self.sink}b{self.block}"

    def recent(self, positions: Tensor) -> Tensor:
        """The first of the latest positions that each position reads dense."""
        return positions - positions % self.block if self.block else positions + 1

    def begin(self, position: int) -> int:
        """As `recent`."""
        return position - position % self.block if self.block else position + 1


@dataclass(frozen=True, slots=True)
class DensePages:
    """Where the dense copies of one step's rows lie."""

    table: Tensor  # [rows, pages] int32, by position as the page table; 0 where there is no copy
    slots: Tensor  # [tokens] int64, dense page * page_size + offset
    count: int  # of the pool, the null page 0 included
