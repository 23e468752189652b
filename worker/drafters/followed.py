"""How far a model has read the texts that it drafts for."""

from __future__ import annotations

from typing import Protocol

from worker.drafters.base import Ask
from worker.slots import SlotTable


class Followed(Protocol):
    """By slot, the positions that have keys and values."""

    def admit(self, slot: int) -> None:
        """The slot has a new owner."""
        ...

    def read(self, ask: Ask) -> int:
        """Positions of the ask's tokens that were computed."""
        ...

    def advance(self, slot: int, end: int) -> None:
        """All positions before `end` are computed."""
        ...

    def confirmed(self, slot: int, right: int) -> None:
        """So many drafts that were fed were right."""
        ...


class OwnPages:
    """Of a model with a pool of its own under the target's page ids. What another sequence has
    computed of shared first pages counts."""

    def __init__(self, slots: SlotTable) -> None:
        self.computed = [0] * len(slots.epoch)
        self._slots = slots
        self._whole: dict[int, int] = {}  # by page of which all positions have: its writer then

    def admit(self, slot: int) -> None:
        computed, writer = 0, self._slots.writer
        for page in self._slots.pages[slot]:
            if self._whole.get(page) != writer[page]:
                break
            computed += self._slots.page_size
        self.computed[slot] = computed

    def read(self, ask: Ask) -> int:
        return self.computed[ask.slot]

    def advance(self, slot: int, end: int) -> None:
        size = self._slots.page_size
        first, last = self.computed[slot] // size, end // size
        self.computed[slot] = end
        for page in self._slots.pages[slot][first:last]:
            self._whole[page] = self._slots.writer[page]

    def confirmed(self, slot: int, right: int) -> None:
        self.advance(slot, self.computed[slot] + right)


class TargetPages:
    """Of the target itself, which has read everything but the last token. What it writes for its
    drafts is written over when they are verified."""

    def admit(self, slot: int) -> None:
        pass

    def read(self, ask: Ask) -> int:
        return len(ask.tokens) - 1

    def advance(self, slot: int, end: int) -> None:
        pass

    def confirmed(self, slot: int, right: int) -> None:
        pass
