"""How many tokens ahead of each sequence are guessed in a step, and by which drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from scheduler.plan import Row, RowResult, StepPlan, StepResult
from scheduler.sequence import Sequence as Running


class Rules(NamedTuple):
    """See `StepPlan`."""

    least: tuple[float, ...] = ()
    heard: tuple[float, ...] = ()
    ahead: bool = False  # drafts are made ahead: see `Row.ahead`
    patience: int = 0


NO_RULES = Rules()


class DraftPolicy(Protocol):
    """Keeps `Sequence.drafts` and `Sequence.drafters`, within `Sequence.most_drafts`.

    Drafts never change the text, and a sequence that ends up with fewer, for want of memory or of
    room in the step, loses nothing but time.
    """

    def begin(self, sequence: Running) -> None:
        """It arrives; and again when it gets a slot."""
        ...

    def plan(self, running: list[Running], joining: int = 0, unread: int = 0) -> Rules:
        """Decides before a step. `joining`: sequences that there are slots for, so that they run
        once their prompts, `unread` tokens, find room in a step."""
        ...

    def learn(self, sequence: Running, row: Row, done: RowResult) -> None:
        """What became of the drafts of a row that was allowed some, before the sequence learns."""
        ...

    def settled(self, plan: StepPlan, result: StepResult, now: float) -> None:
        """A step has settled; its rows were learnt."""
        ...


class FixedDrafts:
    """The same number for everybody, always; 0 is plain decoding."""

    def __init__(
        self,
        drafts: int = 0,
        drafters: tuple[int, ...] = (0,),
        names: Sequence[str] = (),
        *,
        ahead: bool = False,
        patience: int = 0,
    ) -> None:
        """`names`: those of the drafters by number, for requests that name one."""
        self._rules = Rules(ahead=ahead, patience=patience)
        self._drafts = drafts
        self._drafters = drafters
        self._alone = {name: (number,) for number, name in enumerate(names)}

    def begin(self, sequence: Running) -> None:
        sequence.drafts = min(self._drafts, sequence.most_drafts)
        wanted = self._alone.get(sequence.request.speculation.drafter or "")
        sequence.drafters = wanted or self._drafters

    def plan(self, running: list[Running], joining: int = 0, unread: int = 0) -> Rules:
        return self._rules

    def learn(self, sequence: Running, row: Row, done: RowResult) -> None:
        pass

    def settled(self, plan: StepPlan, result: StepResult, now: float) -> None:
        pass
