"""`Spare`: room that busy tenants leave to those with little, so that a flood keeps nobody waiting.

The order of turns alone is not enough: who comes next in a full batch still waits until a sequence
ends, and then for steps full of other people's prompts. So while several tenants are about, one
that holds more than an equal share of the slots or pages leaves a part of both free. Others may use
it; it fills again with ends. And of every step, the prompts of a tenant that was served more than
another take a part only: who comes next waits for the steps in flight first, and they should be
short.

A tenant that was itself served much less than another leaves it nothing: it holds much because its
sequences are long, and turns must not leave it behind without end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from scheduler.fair_share import Account
from scheduler.sequence import Sequence

PART = 16  # one of so many slots and pages is left,
LEAST = 2  # but so many slots at least
STEP_PART = 4  # a tenant that is ahead has one token of so many in a step for prompts


class Room(NamedTuple):
    """What tenants share."""

    slots: int
    pages: int
    tokens: int  # of a step
    much: int  # weighted tokens: how far behind is much less


class Spare:
    """What stands free for others during one planning step."""

    __slots__ = ("_behind", "_fed", "_held", "_least", "_room", "_tenants", "_used")

    def __init__(self, room: Room, tenants: list[Account], running: Iterable[Sequence]) -> None:
        self._room = room
        self._tenants = len(tenants)
        served = [account.served for account in tenants]
        self._least = min(served, default=0)
        self._behind = max(served, default=0) - room.much
        self._fed: Counter[Account] = Counter()  # prompt tokens in the step
        self._used: Counter[Account] = Counter()  # slots
        self._held: Counter[Account] = Counter()  # pages; shared ones count for each
        for sequence in running:
            self.admit(sequence.account, len(sequence.pages))

    def admit(self, account: Account, pages: int) -> None:
        """One more of its sequences runs."""
        self._used[account] += 1
        self._held[account] += pages

    def beside(self, account: Account, pages: int) -> tuple[int, int]:
        """Slots and pages that must be left if one more of its sequences takes `pages`."""
        room, used = self._room, self._used[account]
        if not used or account.served < self._behind:
            return 0, 0
        share = 1 / self._tenants
        if used + 1 > share * room.slots or self._held[account] + pages > share * room.pages:
            return max(room.slots // PART, LEAST), room.pages // PART
        return 0, 0

    def feed(self, account: Account, tokens: int) -> None:
        """So many more tokens of its prompts are in the step."""
        self._fed[account] += tokens

    def room(self, account: Account, most: int) -> int:
        """How many tokens, up to `most`, its next chunk may have."""
        if account.served <= self._least:
            return most
        part = max(self._room.tokens // STEP_PART, 1)
        return max(min(most, part - self._fed[account]), 0)
