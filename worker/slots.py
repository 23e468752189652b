"""Device arrays by slot: which tokens a sequence holds, how far its KV goes, and in which pages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.sampling.upload import upload
from scheduler.plan import Admit, Demotion
from worker.window_pages import WindowPages

Growth = tuple[list[int], list[int], list[int]]  # slots, places in their tables, pages


class SlotTable:
    """State of every slot between steps. Slot 0 is the null slot, page 0 the null page.

    Invariants, for a slot whose owner has `computed` positions with valid KV:

    - `tokens[slot, :computed]` are the tokens behind that KV;
    - a live sequence's next input token stands at `tokens[slot, computed]`;
    - `page_table[slot, : pages[slot]]` covers every position a launched row may write, as soon as
      the step's batch is built; `host_table` does at once.
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
        # Host mirrors: exact pages, as lists and as `page_table` has them, and owners, and an upper
        # bound of `computed`.
        self.pages: list[list[int]] = [[] for _ in range(num_slots)]
        self.host_table = np.zeros((num_slots, max_pages), dtype=np.int32)
        self.bound = [0] * num_slots
        self.epoch = [-1] * num_slots
        self.writer: defaultdict[int, int] = defaultdict(int)  # by page: another for each new owner
        self._growth: Growth = ([], [], [])  # that is not in `page_table` yet

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
            self.tokens[slot, :cached] = upload(admit.cached, self.tokens.device, torch.int32)
        self._append(slot, admit.pages)
        for copy in admit.loads:
            self.writer[copy.target] += 1

    def add_pages(self, slot: int, pages: Sequence[int]) -> None:
        """Appends new pages to the slot's table; between admissions tables only grow, but for what
        is demoted."""
        for page in pages:
            self.writer[page] += 1
        self._append(slot, pages)

    def demote(self, demotion: Demotion) -> None:
        """A page that a step before has filled is half of a page from now on."""
        slot, place, _, half = demotion
        slots, places, changed = self._growth
        self.pages[slot][place] = half
        self.host_table[slot, place] = half
        slots.append(slot)
        places.append(place)
        changed.append(half)

    def _append(self, slot: int, pages: Sequence[int]) -> None:
        slots, places, added = self._growth
        start = len(self.pages[slot])
        self.pages[slot] += pages
        self.host_table[slot, start : start + len(pages)] = pages
        slots += [slot] * len(pages)
        places += range(start, start + len(pages))
        added += pages

    def take_growth(self) -> Growth:
        """What the device's table has not been told: to be sent to it, and written there."""
        growth, self._growth = self._growth, ([], [], [])
        return growth

    def write_growth(self, slots: Tensor, places: Tensor, pages: Tensor) -> None:
        """`take_growth`'s lists, on the device: each [n] int64."""
        if slots.shape[0]:
            self.page_table[slots, places] = pages.to(torch.int32)
