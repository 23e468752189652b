"""`RecyclingDrafter`: what the target chose after the same token lately.

Token Recycling (arXiv 2408.08696) keeps for each token those that the target found most likely
after it, and grows a tree of them. Here a draft is a chain, so one successor is kept: of each pair
of tokens, and of each token alone for pairs that were never seen. The tables are fed by every row
that is verified, wrong drafts included, since what the target chose after them is known as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from worker.drafters.base import LATER, NOTHING, Ask, Guess
from worker.drafters.memory import Groups, Shares

PAIRS = 200_000  # kept for a group; about 30 MB
CATCH_UP = 8192  # tokens read in one step, which wait for it
_AFTER_PAIR, _AFTER_ONE = 0, 1


class Successors:
    """Of one group."""

    def __init__(self) -> None:
        self.after_one: dict[int, int] = {}
        self.after_pair: dict[tuple[int, int], int] = {}

    def learn(self, before: int, token: int, following: int) -> None:
        pairs = self.after_pair
        pairs[before, token] = following
        self.after_one[token] = following
        if len(pairs) > PAIRS:  # the oldest half, by when a pair was first seen
            for pair in list(pairs)[: PAIRS // 2]:
                del pairs[pair]


class RecyclingDrafter:
    """Drafts a chain of successors."""

    name = "recycling"

    def __init__(self) -> None:
        self._groups: Groups[Successors] = Groups(Successors)
        self._group: dict[int, bytes] = {}  # by slot
        self._known: dict[int, int] = {}  # tokens of the text that were read
        self._before: dict[int, int] = {}  # the last token but one when it was asked last
        self._kinds: dict[int, list[int]] = {}  # of the drafts of the last guess
        self._right = Shares(2, 0.5)

    def admit(self, slot: int, group: bytes) -> None:
        self._group[slot] = group
        self._known[slot] = 0

    def ended(self, slot: int, tokens: list[int], prompt_len: int) -> list[bool] | None:
        return None

    def propose(self, asks: Sequence[Ask], least: float) -> list[Guess]:
        budget = CATCH_UP
        guesses = []
        for ask in asks:
            table = self._groups.of(self._group.get(ask.slot, b""))
            budget -= self._catch_up(ask, table, budget)
            behind = self._known[ask.slot] < len(ask.tokens)
            guesses.append(LATER if behind else self._guess(ask, table, least))
        return guesses

    def verified(self, slot: int, fed: Sequence[int], chosen: Sequence[int]) -> None:
        table = self._groups.of(self._group.get(slot, b""))
        before = self._before[slot]
        for token, following in zip(fed, chosen, strict=True):
            table.learn(before, token, following)
            before = token
        for kind, draft, token in zip(self._kinds[slot], fed[1:], chosen, strict=False):
            self._right.learn(kind, draft == token)
            if draft != token:
                break

    def _catch_up(self, ask: Ask, table: Successors, most: int) -> int:
        slot, tokens = ask.slot, ask.tokens
        start = self._known.get(slot, 0)
        end = min(len(tokens), start + max(most, 0))
        for at in range(max(start, 2), end):
            table.learn(tokens[at - 2], tokens[at - 1], tokens[at])
        self._known[slot] = end
        return end - start

    def _guess(self, ask: Ask, table: Successors, least: float) -> Guess:
        before, token = ([-1, *ask.tokens[-2:]])[-2:]
        self._before[ask.slot] = before
        kinds = self._kinds[ask.slot] = []
        drafts: list[int] = []
        confidence: list[float] = []
        all_right = 1.0
        while len(drafts) < ask.most:
            following = table.after_pair.get((before, token))
            kind = _AFTER_PAIR
            if following is None:
                following, kind = table.after_one.get(token), _AFTER_ONE
            if following is None:
                break
            all_right *= self._right[kind]
            if drafts and all_right < least:
                break
            kinds.append(kind)
            drafts.append(following)
            confidence.append(self._right[kind])
            before, token = token, following
        return Guess(drafts, confidence) if drafts else NOTHING
