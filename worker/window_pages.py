"""`WindowPages`: dense pages of the positions that windows of packed pages are read from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.kv.windows import DensePages, Windows


def dense_page_count(
    windows: Windows | None, num_slots: int, page_size: int, max_step_tokens: int
) -> int:
    """How many are enough, the null page included: for each slot its sinks, its latest block (or
    the page that its next token falls into) and a page that a step begins; and those that the
    tokens of one step fill."""
    if windows is None:
        return 0
    of_slot = -(-windows.sink // page_size) + max(windows.block // page_size, 1) + 1
    return 1 + num_slots * of_slot + -(-max_step_tokens // page_size)


class WindowPages:
    """Which dense page holds which positions of each slot.

    During a step a slot has pages for all positions that the step appends, since queries of a chunk
    read their own block dense whichever it is. Between steps it has those of its sinks and of the
    block that its next token is in; that of drafts that were rejected is given back with the rest.
    """

    table: Tensor  # [slots, max_pages] int32, by position as the page table; 0: no copy

    def __init__(
        self,
        windows: Windows,
        count: int,  # see `dense_page_count`
        num_slots: int,
        max_pages: int,
        page_size: int,
        device: torch.device,
    ) -> None:
        self.windows = windows
        self.count = count
        self.table = torch.zeros(num_slots, max_pages, dtype=torch.int32, device=device)
        self._page_size = page_size
        self._sinks = -(-windows.sink // page_size)  # pages
        self._free = list(range(count - 1, 0, -1))
        self._held: list[dict[int, int]] = [{} for _ in range(num_slots)]  # by place in the table

    @property
    def free(self) -> int:
        return len(self._free)

    def cover(self, slot: int, start: int, end: int) -> None:
        """Positions [start, end) are about to be appended."""
        held, size = self._held[slot], self._page_size
        places = [i for i in range(start // size, -(-end // size)) if i not in held]
        if not places:
            return
        pages = [self._free.pop() for _ in places]
        held.update(zip(places, pages, strict=True))
        self.table[slot, places] = torch.tensor(pages, dtype=torch.int32, device=self.table.device)

    def settle(self, slot: int, length: int) -> None:
        """A step has ended, and the slot's next token comes at `length`."""
        size = self._page_size
        kept = range(self.windows.begin(length) // size, -(-length // size))
        self._give_back(slot, (i for i in self._held[slot] if i >= self._sinks and i not in kept))

    def clear(self, slot: int) -> None:
        """The slot gets another owner."""
        self._give_back(slot, self._held[slot])

    def _give_back(self, slot: int, places: Iterable[int]) -> None:
        places = list(places)
        if places:
            self._free += [self._held[slot].pop(i) for i in places]
            self.table[slot, places] = 0

    def of(
        self, row_slots: Tensor, token_slots: Tensor, positions: Tensor, pages: int
    ) -> DensePages:
        """Of a step's rows, [rows], and tokens, [tokens] each; the table `pages` wide."""
        size = self._page_size
        page = self.table[token_slots, positions // size].long()
        return DensePages(self.table[row_slots, :pages], page * size + positions % size, self.count)
