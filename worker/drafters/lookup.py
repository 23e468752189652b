"""`LookupDrafter`: what followed the same few tokens earlier in the same text (prompt lookup).

The longest run of tokens at the end that stood in the text before is looked for, and what followed
it the last time is the guess: as it is for quotations, edited code and tables. Nothing is shared
between sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

from worker.drafters.base import LATER, NOTHING, Ask, Guess
from worker.drafters.memory import Shares

SIZES = (6, 4, 3, 2)  # tokens of the run that is looked for, the longest first
CATCH_UP = 4096  # tokens read in one step, which wait for it
_LATER = len(SIZES)  # the kind of a guess that follows a right one


class _Own:
    """One slot."""

    def __init__(self) -> None:
        # By size: where the run ended the last time, as the number of tokens up to there.
        self.last: list[dict[tuple[int, ...], int]] = [{} for _ in SIZES]
        self.known = 0
        self.kind = 0  # of the last guess


class LookupDrafter:
    """Drafts what followed the last time."""

    name = "lookup"

    def __init__(self) -> None:
        self._own: dict[int, _Own] = {}
        self._right = Shares(len(SIZES) + 1, 0.5)

    def admit(self, slot: int, group: bytes) -> None:
        self._own.pop(slot, None)

    def ended(self, slot: int, tokens: list[int], prompt_len: int) -> list[bool] | None:
        return None

    def propose(self, asks: Sequence[Ask], least: float) -> list[Guess]:
        budget = CATCH_UP
        guesses = []
        for ask in asks:
            own = self._own.get(ask.slot)
            if own is None:
                own = self._own[ask.slot] = _Own()
            budget -= _catch_up(own, ask.tokens, budget)
            # The last token is read by the next ask: a run does not find itself.
            behind = own.known < len(ask.tokens) - 1
            guesses.append(LATER if behind else self._guess(own, ask, least))
        return guesses

    def verified(self, slot: int, fed: Sequence[int], chosen: Sequence[int]) -> None:
        own = self._own[slot]
        for position in range(1, len(fed)):
            right = fed[position] == chosen[position - 1]
            self._right.learn(own.kind if position == 1 else _LATER, right)
            if not right:
                break

    def _guess(self, own: _Own, ask: Ask, least: float) -> Guess:
        tokens = ask.tokens
        for kind, size in enumerate(SIZES):
            if size > len(tokens):
                continue
            at = own.last[kind].get(tuple(tokens[-size:]))
            if at is None:
                continue
            own.kind = kind
            drafts: list[int] = []
            confidence: list[float] = []
            all_right = 1.0
            for token in tokens[at : at + ask.most]:
                drafts.append(token)
                confidence.append(self._right[_LATER if confidence else kind])
                all_right *= confidence[-1]
                if all_right < least:
                    break
            return Guess(drafts, confidence)
        return NOTHING


def _catch_up(own: _Own, tokens: list[int], most: int) -> int:
    """Notes the runs that end before the last token, as many as `most`. How many it read."""
    end = min(len(tokens) - 1, own.known + max(most, 0))
    read = end - own.known
    for stop in range(own.known + 1, end + 1):
        for kind, size in enumerate(SIZES):
            if size <= stop:
                own.last[kind][tuple(tokens[stop - size : stop])] = stop
    own.known = end
    return read
