"""`SuffixDrafter`: what followed the same words before (SuffixDecoding, arXiv 2411.04975).

A trie of all substrings up to a length, with counts, says how often each token followed each run of
tokens. One holds the sequence's own text, another the texts of all sequences of its group. A
guess starts after the end of the text: from the longest suffix that is in the trie and was followed
by something, the most frequent child is taken again and again.

The answer of one long suffix is worth more than that of a short one, but a short one may have seen
more. So every length of suffix is tried, and the guess with the largest sum of survivals is made:
the number of drafts that it expects to be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from worker.drafters.base import LATER, NOTHING, Ask, Guess
from worker.drafters.memory import Groups

DEPTH = 10  # tokens of a suffix, and of what follows it
# Of a memory. A thousand take about 150 kB: all groups together at most 240 MB, a slot 6 MB.
NODES, NODES_OF_A_SLOT = 200_000, 40_000
GROUPS = 8  # that are remembered
NODES_A_TOKEN = 4  # at least, as a trie's age goes: text that repeats itself makes fewer
CATCH_UP = 512  # tokens read in one step, which wait for it
LONGEST_SHADOW = 2048  # tokens of a text that is read at its end, though nobody asked about it
TOKEN_BITS = 32  # of a token id: more than any vocabulary takes
LEAST = 0.1  # drafts that are less probable are not made
_DOUBT = 0.5  # times that something else is taken to have followed
_promise = itemgetter(0)


class Trie:
    """Counts of runs of tokens. Node 0 is the root, the empty run."""

    def __init__(self, depth: int = DEPTH) -> None:
        self._depth = depth
        self.tokens = 0  # that were added
        # By node and token, in one number: a tuple each would be looked at by every collection.
        self._child: dict[int, int] = {}
        self._count = [0]
        self._best = [-1]  # by node: the token that followed most often, the newest of equals
        self._most_often = [0]  # how often that was

    def __len__(self) -> int:
        return len(self._count)

    def add(self, active: list[int], token: int) -> list[int]:
        """A token after runs that end at these nodes, the longest first; the new ones."""
        child, count, best, most_often = self._child, self._count, self._best, self._most_often
        self.tokens += 1
        extended = []
        for node in active:
            key = node << TOKEN_BITS | token
            found = child.get(key)
            if found is None:
                child[key] = found = len(count)
                count.append(0)
                best.append(-1)
                most_often.append(0)
            times = count[found] = count[found] + 1
            if times >= most_often[node]:
                best[node], most_often[node] = token, times
            extended.append(found)
        if len(extended) == self._depth:
            del extended[0]
        extended.append(0)
        return extended

    def follow(self, active: list[int], token: int) -> list[int]:
        """The same, where nothing is added: of the runs that are in the trie."""
        child = self._child
        keys = (node << TOKEN_BITS | token for node in active)
        return [*(found for key in keys if (found := child.get(key))), 0]

    def next(self, active: list[int]) -> int:
        """The most frequent token after runs that end at these nodes; -1: none has followed."""
        best = self._best
        for node in active:
            if best[node] >= 0:
                return best[node] if node else -1
        return -1

    def guess(self, tokens: list[int], most: int, least: float) -> tuple[float, Guess]:
        """The best guess after the text, and how many of its tokens should be right."""
        child, count, best, most_often = self._child, self._count, self._best, self._most_often
        found = 0.0, NOTHING
        end = len(tokens)
        for length in range(min(self._depth - 1, end), 0, -1):
            node = 0
            for token in tokens[end - length :]:
                node = child.get(node << TOKEN_BITS | token, -1)
                if node < 0:
                    break
            if node < 0 or best[node] < 0:
                continue
            drafts: list[int] = []
            confidence: list[float] = []
            survival, score = 1.0, 0.0
            suffix = tokens[end - length :]
            while len(drafts) < most:
                if best[node] < 0:  # as deep as it goes: on from a shorter suffix
                    node, suffix = self._shorter(suffix)
                    if not node:
                        break
                often, times = most_often[node], count[node]
                # The end of the text itself is counted too, and was not followed by anything;
                # unless it is in the other trie.
                if not drafts and times > often:
                    times -= 1
                share = often / (times + _DOUBT)
                if survival * share < least:
                    break
                token = best[node]
                survival *= share
                score += survival
                drafts.append(token)
                confidence.append(share)
                suffix.append(token)
                node = child[node << TOKEN_BITS | token]
            if score > found[0]:
                found = score, Guess(drafts, confidence)
            if score >= 0.8 * most:
                break
        return found

    def _shorter(self, suffix: list[int]) -> tuple[int, list[int]]:
        """The node of the longest shorter suffix that was followed by something; 0 if none was."""
        for start in range(max(len(suffix) - self._depth + 1, 1), len(suffix)):
            node = 0
            for token in suffix[start:]:
                node = self._child.get(node << TOKEN_BITS | token, -1)
                if node < 0:
                    break
            if node >= 0 and self._best[node] >= 0:
                return node, suffix[start:]
        return 0, suffix


class Memory:
    """Two tries. A full young one takes the place of the old one, which is forgotten. That is
    done at once: to build one trie up again from its newer half kept every stream waiting."""

    def __init__(self, nodes: int = NODES, depth: int = DEPTH) -> None:
        self._most = nodes // 2
        self._depth = depth
        self.young, self.old = Trie(depth), Trie(depth)
        self.turns = 0

    def __len__(self) -> int:
        return len(self.young) + len(self.old)

    def begin(self) -> Text:
        """A text, to be appended to."""
        return Text(self)

    def guess(self, tokens: list[int], most: int, least: float) -> tuple[float, Guess]:
        """The better one of both tries' guesses."""
        young = self.young.guess(tokens, most, least)
        old = self.old.guess(tokens, most, least)
        return max(young, old, key=_promise)

    def turn_if_full(self) -> None:
        young = self.young
        if len(young) > self._most or young.tokens > self._most // NODES_A_TOKEN:
            self.turn()

    def turn(self) -> None:
        self.old, self.young = self.young, Trie(self._depth)
        self.turns += 1


class Text:
    """A text on its way into a memory."""

    __slots__ = ("_memory", "_old", "_turns", "_young")

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._turns = memory.turns
        self._young, self._old = [0], [0]  # the nodes at which it ends

    def extend(self, tokens: Sequence[int]) -> list[bool]:
        """Appends; by token, whether it was what the memory would have guessed."""
        memory, young, old = self._memory, self._young, self._old
        if self._turns != memory.turns:
            young, old = [0], young if self._turns + 1 == memory.turns else [0]
            self._turns = memory.turns
        guessed = []
        for token in tokens:
            likely = memory.young.next(young)
            if likely < 0:
                likely = memory.old.next(old)
            guessed.append(likely == token)
            young, old = memory.young.add(young, token), memory.old.follow(old, token)
        self._young, self._old = young, old
        memory.turn_if_full()
        return guessed


class _Own:
    """One slot."""

    def __init__(self, shared: Memory) -> None:
        self.shared = shared
        self.memory = Memory(NODES_OF_A_SLOT)
        self.text = self.memory.begin()
        self.text_of_all: Text | None = None
        self.known = 0  # tokens of the text that are in both


class SuffixDrafter:
    """Drafts from the sequence's own past and that of its group, whichever promises more."""

    name = "suffix"

    def __init__(self) -> None:
        self._groups: Groups[Memory] = Groups(Memory, most=GROUPS)
        self._group: dict[int, bytes] = {}  # by slot
        self._own: dict[int, _Own] = {}

    def admit(self, slot: int, group: bytes) -> None:
        self._group[slot] = group
        self._own.pop(slot, None)

    def ended(self, slot: int, tokens: list[int], prompt_len: int) -> list[bool] | None:
        if len(tokens) > LONGEST_SHADOW:
            return None
        own = self._own.get(slot)
        known = 0 if own is None else own.known
        if own is None or own.text_of_all is None:
            into = self._groups.of(self._group.get(slot, b"")).begin()
        else:
            into = own.text_of_all
        guessed = into.extend(tokens[known:])
        return guessed[max(prompt_len - known, 0) :] if known <= prompt_len else None

    def propose(self, asks: Sequence[Ask], least: float) -> list[Guess]:
        least = max(least, LEAST)
        budget = CATCH_UP
        for ask in asks:
            budget -= self._catch_up(ask, budget)
        return [self._guess(ask, least) for ask in asks]

    def verified(self, slot: int, fed: Sequence[int], chosen: Sequence[int]) -> None:
        pass  # what was right comes with the next ask

    def _guess(self, ask: Ask, least: float) -> Guess:
        own = self._own[ask.slot]
        if own.known < len(ask.tokens):
            return LATER
        here = own.memory.guess(ask.tokens, ask.most, least)
        there = own.shared.guess(ask.tokens, ask.most, least)
        return max(here, there, key=_promise)[1]

    def _catch_up(self, ask: Ask, most: int) -> int:
        """Reads what is new, or so many tokens of it. How many it read."""
        own = self._own.get(ask.slot)
        group = self._group.get(ask.slot, b"")
        if own is None:
            shared = self._groups.of(group)
            own = self._own[ask.slot] = _Own(shared)
            own.text_of_all = shared.begin()
        else:
            self._groups.used(group)
        assert own.text_of_all is not None
        new = ask.tokens[own.known : own.known + max(most, 0)]
        own.known += len(new)
        own.text.extend(new)
        own.text_of_all.extend(new)
        return len(new)
