"""`Drafter`: guesses what a sequence will go on with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(slots=True)
class Ask:
    """A live row that may verify drafts."""

    slot: int
    # All tokens known, the one the row feeds last. Belongs to the worker, which appends to it:
    # between two admissions of a slot, what was there stays as it was.
    tokens: list[int]
    most: int  # drafts, at least 1
    ahead: int = 0  # to be made while these are verified


class Guess(NamedTuple):
    """Drafts for one row, maybe none."""

    tokens: list[int]
    # Of each, how probable it is if all before it are right. An estimate: the controller learns how
    # much it is worth.
    confidence: list[float]


NOTHING = Guess([], [])
LATER = Guess([], [])  # it has something to say once it has caught up with the text


class Drafter(Protocol):
    """One way to guess. It lives on the worker's thread, and knows nothing but tokens.

    Rows that are not asked about are not watched either: whoever is asked again catches up by the
    tokens of the ask. So a drafter that nobody listens to costs nothing.
    """

    name: str

    def admit(self, slot: int, group: bytes) -> None:
        """The slot gets a new owner. What is learnt from one sequence may be used for another of
        the same group alone."""
        ...

    def ended(self, slot: int, tokens: list[int], prompt_len: int) -> list[bool] | None:
        """The owner of the slot has gone; this was its text. By token of its output, whether a
        draft of it would have been right, where that is found out without much ado."""
        ...

    def propose(self, asks: Sequence[Ask], least: float) -> list[Guess]:
        """A guess for each; see `StepPlan.least` for when to stop."""
        ...

    def verified(self, slot: int, fed: Sequence[int], chosen: Sequence[int]) -> None:
        """The target has chosen a token after each of those fed to it, right drafts or not.

        Of rows alone that this drafter was asked about.
        """
        ...
