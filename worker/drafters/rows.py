"""What a draft model has under way in one step: rows, what they have to read, and drafts that are
still on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from worker.drafters.base import Ask
from worker.drafters.spans import Moved


@dataclass(slots=True)
class Row:
    """One ask on its way."""

    ask: Ask
    made: int = 0  # drafts, which the device may be the only one to know
    tokens: list[int] = field(default_factory=list)  # those that were read
    confidence: list[float] = field(default_factory=list)
    # By draft, what would have been drawn if it could not be; only where drafts are made ahead.
    others: list[int] = field(default_factory=list)
    all_right: float = 1.0  # the probability that all drafts that were read are
    moved: Moved | None = None  # where its last keys and values lie, if not in the slot's pages

    @property
    def length(self) -> int:
        return len(self.ask.tokens) + self.made

    def add(self, token: int, confidence: float) -> None:
        self.tokens.append(token)
        self.confidence.append(confidence)
        self.all_right *= confidence

    def drafts_on(self, least: float) -> bool:
        return self.made < self.ask.most and self.believes(least)

    def believes(self, least: float) -> bool:
        return not self.tokens or self.all_right >= least


class Reading(NamedTuple):
    """Positions of a row that go through the model: from `start` to before `end`."""

    row: Row
    start: int
    end: int

    def ids(self) -> list[int]:
        return self.row.ask.tokens[self.start : self.end]


@dataclass(frozen=True, slots=True)
class Front:
    """Rows that draft on, side by side. All tensors on the device."""

    rows: list[Row]
    slots: Tensor  # [rows] int64
    lengths: Tensor  # [rows] int64, of the text and the drafts of each
    page_table: Tensor  # [rows, pages] int32, up to the last draft

    def keep(self, stay: list[int], at: Tensor) -> Front:
        """Some of the rows; `at`: `stay` on the device."""
        rows = [self.rows[i] for i in stay]
        return Front(rows, self.slots[at], self.lengths[at], self.page_table[at])


class Drawn(NamedTuple):
    """A draft of each of some rows, on the device."""

    rows: list[Row]
    tokens: Tensor  # [rows] int64
    confidence: Tensor  # [rows] float32
    others: Tensor | None  # [rows] int64, what would have been drawn if those could not be
