"""Device arrays by slot: which tokens a sequence holds, how far its KV goes, and in which pages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from scheduler.plan import Admit
from worker.window_pages import WindowPages


class SlotTable:
    """State of every slot between steps. Slot 0 is the null slot, page 0 the null page.

    Invariants, for a slot whose owner has `computed` positions with valid KV:

    - `tokens[slot, :computed]` are the tokens behind that KV;
    - a live sequence's next input token stands at `tokens[slot, computed]`;
    - `page_table[slot, : pages[slot]]` covers every position a launched row may write.
    """

    tokens: Tensor  # [slots, max_len + 1] int32
    computed: Tensor  # [slots] int64
    page_table: Tensor  # [slots, max_pages] int32

    def __init__(
        self,
        num_slots: int,
        max_len: int,
        page_size: int,
        device: torch.device,
        windows: WindowPages | None = None,
    ) -> None:
        max_pages = -(-max_len // page_size)
        self.windows = windows
        self.page_size = page_size
        self.tokens = torch.zeros(num_slots, max_len + 1, dtype=torch.int32, device=device)
        self.computed = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.page_table = torch.zeros(num_slots, max_pages, dtype=torch.int32, device=device)
        # Host mirrors: exact pages and owners, and an upper bound of `computed`.
        self.pages: list[list[int]] = [[] for _ in range(num_slots)]
        self.bound = [0] * num_slots
        self.epoch = [-1] * num_slots
        self.writer: defaultdict[int, int] = defaultdict(int)  # by page: another for each new owner

    def admit(self, admit: Admit) -> None:
        """Gives the slot to a new owner whose cached prefix is already in the pool."""
        slot, cached = admit.slot, len(admit.cached)
        self.epoch[slot] = admit.epoch
        self.pages[slot] = []
        if self.windows is not None:
            self.windows.clear(slot)
        self.bound[slot] = cached
        self.computed[slot] = cached
        if cached:
            self.tokens[slot, :cached] = torch.tensor(admit.cached, dtype=torch.int32)
        self._append(slot, admit.pages)
        for copy in admit.loads:
            self.writer[copy.target] += 1

    def add_pages(self, slot: int, pages: Sequence[int]) -> None:
        """Appends new pages to the slot's table; tables only grow between admissions."""
        for page in pages:
            self.writer[page] += 1
        self._append(slot, pages)

    def _append(self, slot: int, pages: Sequence[int]) -> None:
        if not pages:
            return
        start = len(self.pages[slot])
        self.pages[slot] += pages
        end = start + len(pages)
        if len(pages) == 1:
            self.page_table[slot, start] = pages[0]
        else:
            self.page_table[slot, start:end] = torch.tensor(pages, dtype=torch.int32)
