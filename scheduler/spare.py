"""`Spare`: room that busy tenants leave to those with little, so that a flood keeps nobody waiting.

The order of turns alone is not enough: who comes next in a full batch still waits until a sequence
ends, and then for steps full of other people's prompts. So while several tenants are about, one
that holds more than an equal share of the slots or pages leaves a part of both free. Others may use
it; it fills again with ends. And of every step, the prompts of such a tenant take a part only, as
do those of one that was served more than another: who comes next waits for the steps in flight
first, and they should be short. The step that ends a prompt of another has none of them at all.

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

    __slots__ = (
        "_behind",
        "_fed",
        "_held",
        "_least",
        "_much",
        "_room",
        "_tenants",
        "_used",
        "ending",
    )

    def __init__(self, room: Room, tenants: list[Account], running: Iterable[Sequence]) -> None:
        self._room = room
        self._tenants = len(tenants)
        served = [account.served for account in tenants]
        self._least = min(served, default=0)
        self._behind = max(served, default=0) - room.much
        self._fed: Counter[Account] = Counter()  # prompt tokens in the step
        self.ending = False  # of one that is not ahead, a prompt ends with the step
        self._used: Counter[Account] = Counter()  # slots
        self._held: Counter[Account] = Counter()  # pages; shared ones count for each
        for sequence in running:
            self.admit(sequence.account, len(sequence.pages))
        # Who had much before the step: what a prompt may have of it does not change meanwhile.
        self._much = {account for account in self._used if self._has_much(account, 0, 0)}

    def admit(self, account: Account, pages: int) -> None:
        """One more of its sequences runs."""
        self._used[account] += 1
        self._held[account] += pages

    def beside(self, account: Account, pages: int) -> tuple[int, int]:
        """Slots and pages that must be left if one more of its sequences takes `pages`."""
        room = self._room
        if self._used[account] and self._has_much(account, 1, pages):
            return max(room.slots // PART, LEAST), room.pages // PART
        return 0, 0

    def _has_much(self, account: Account, slots: int, pages: int) -> bool:
        """Whether it would hold more than an equal share if it got so much more."""
        if account.served < self._behind:
            return False
        room, share = self._room, 1 / self._tenants
        return (
            self._used[account] + slots > share * room.slots
            or self._held[account] + pages > share * room.pages
        )

    def feed(self, account: Account, tokens: int, own: int = 0, ends: bool = False) -> None:
        """So many more tokens of its prompts are in the step; `ends`: the last of one of them."""
        self._fed[account] += tokens
        self.ending |= ends and not self.ahead(account, own)

    def room(self, account: Account, most: int, own: int = 0) -> int:
        """How many tokens, up to `most`, the next chunk of a prompt may have, for which the tenant
        was charged `own` already."""
        if not self.ahead(account, own):
            return most
        part = 0 if self.ending else max(self._room.tokens // STEP_PART, 1)
        return max(min(most, part - self._fed[account]), 0)

    def ahead(self, account: Account, own: int = 0) -> bool:
        """Whether others come before it, for what it was served or holds."""
        return account.served - own > self._least or account in self._much
