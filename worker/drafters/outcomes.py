"""What the target may choose while its drafts are verified, and drafts that were made for it.

The likeliest outcome is that all drafts are right, and after them comes the token that the draft
model would choose. The next likely are that one draft is wrong, the less it was believed in, and in
its place comes what the draft model would have chosen otherwise: both models draw with the same
noise. So outcomes are kept by the tokens that they bring (the outcome cache of Saguaro,
arXiv 2603.03251, keyed there by accepted count and recovery token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from worker.drafters.base import NOTHING, Guess
from worker.drafters.spans import Moved

MOST_BRANCHES = 8  # outcomes with a wrong draft that are drafted on for in one step, of all rows
LEAST_LIKELY = 0.04  # of such an outcome
THOUGHT_OF = 0.6  # that what would have been drawn otherwise is right, where the draft is not


class Branch(NamedTuple):
    """One draft is wrong."""

    likely: float
    row: int
    accepted: int  # drafts before it
    token: int  # that is right in its place


class Outcome(NamedTuple):
    """Drafts for one of them."""

    guess: Guess
    moved: Moved | None = None  # where the keys and values lie, if not in the slot's own pages


@dataclass(slots=True)
class Foreseen:
    """Of one slot."""

    known: int  # tokens when its drafts went to be verified
    drafts: tuple[int, ...]
    outcomes: dict[tuple[int, ...], Outcome] = field(default_factory=dict)  # by tokens committed

    def look_up(self, tokens: Sequence[int]) -> tuple[Outcome, bool]:
        """The outcome if the tokens are these now, one without drafts if it is another; and whether
        all drafts were right."""
        came = tuple(tokens[self.known :])
        return self.outcomes.get(came, Outcome(NOTHING)), came[:-1] == self.drafts


def likely_branches(drafts: Sequence[Guess], others: Sequence[Sequence[int]]) -> list[Branch]:
    """The likeliest outcomes with a wrong draft. `others`: what each row's drafts might have been
    otherwise; empty where that is not known."""
    found: list[Branch] = []
    for row, (guess, instead) in enumerate(zip(drafts, others, strict=True)):
        right = 1.0
        for accepted, (confidence, token) in enumerate(
            zip(guess.confidence, instead, strict=False)
        ):
            likely = right * (1.0 - confidence) * THOUGHT_OF
            if likely >= LEAST_LIKELY:
                found.append(Branch(likely, row, accepted, token))
            right *= confidence
    return sorted(found, reverse=True)[:MOST_BRANCHES]
