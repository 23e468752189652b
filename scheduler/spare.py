"""`Spare`: room that busy tenants leave to those with little, so that a flood keeps nobody waiting.

The order of turns alone is not enough: who comes next in a full batch still waits until a sequence
ends, and then for steps full of other people's prompts. So while several tenants are about, one
that holds more than an equal share of the slots or pages leaves a part of both free. Tenants below
their share may use it; it fills again with ends. And of every step, one tenant's prompts take a
part only: who comes next waits for the steps in flight first, and they should be short.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from scheduler.fair_share import Account
from scheduler.sequence import Sequence

PART = 16  # one of so many slots and pages is left,
LEAST = 2  # but so many slots at least
STEP_PART = 4  # one token of so many in a step is for the prompts of one tenant, at most


class Spare:
    """What stands free for others during one planning step."""

    __slots__ = ("_fed", "_held", "_pages", "_slots", "_tenants", "_tokens", "_used")

    def __init__(
        self, running: Iterable[Sequence], tenants: int, slots: int, pages: int, tokens: int
    ) -> None:
        """`tenants` share so many slots and pages, and tokens in a step."""
        self._tenants = tenants
        self._slots = slots
        self._pages = pages
        self._tokens = tokens
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
        used = self._used[account]
        share = 1 / self._tenants
        if used and (
            used + 1 > share * self._slots or self._held[account] + pages > share * self._pages
        ):
            return max(self._slots // PART, LEAST), self._pages // PART
        return 0, 0

    def feed(self, account: Account, tokens: int) -> None:
        """So many more tokens of its prompts are in the step."""
        self._fed[account] += tokens

    def room(self, account: Account, most: int) -> int:
        """How many tokens, up to `most`, its next chunk may have."""
        return max(min(most, self._tokens // STEP_PART - self._fed[account]), 0)
