"""How many tokens ahead of each sequence are guessed in a step, and by which drafter."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from scheduler.plan import Row, RowResult, StepPlan, StepResult
from scheduler.sequence import Sequence


class Rules(NamedTuple):
    """See `StepPlan`."""

    least: tuple[float, ...] = ()
    heard: tuple[float, ...] = ()


NO_RULES = Rules()


class DraftPolicy(Protocol):
    """Keeps `Sequence.drafts` and `Sequence.drafters`, within `Sequence.most_drafts`.

    Drafts never change the text, and a sequence that ends up with fewer, for want of memory or of
    room in the step, loses nothing but time.
    """

    def begin(self, sequence: Sequence) -> None:
        """It arrives."""
        ...

    def plan(self, running: list[Sequence]) -> Rules:
        """Decides before a step."""
        ...

    def learn(self, sequence: Sequence, row: Row, done: RowResult) -> None:
        """What became of the drafts of a row that was allowed some, before the sequence learns."""
        ...

    def settled(self, plan: StepPlan, result: StepResult, now: float) -> None:
        """A step has settled; its rows were learnt."""
        ...


class FixedDrafts:
    """The same number for everybody, always; 0 is plain decoding."""

    def __init__(self, drafts: int = 0, drafters: tuple[int, ...] = (0,)) -> None:
        self._drafts = drafts
        self._drafters = drafters

    def begin(self, sequence: Sequence) -> None:
        sequence.drafts = min(self._drafts, sequence.most_drafts)
        sequence.drafters = self._drafters

    def plan(self, running: list[Sequence]) -> Rules:
        return NO_RULES

    def learn(self, sequence: Sequence, row: Row, done: RowResult) -> None:
        pass

    def settled(self, plan: StepPlan, result: StepResult, now: float) -> None:
        pass
