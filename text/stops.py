"""Stop strings, found in text as it grows.

The rule is a function of the text alone, however tokens or chunks cut it: reading character by
character, the first stop string to be completed ends the text (of several completed by the same
character, the longest). Each string is followed by a Knuth-Morris-Pratt automaton, whose state is
exactly "how much of this string the text ends with", so what must be held back, the longest suffix
that some stop string starts with, is the largest state.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """The stop strings of one request, compiled once and shared by its choices.

    Raises `ValueError` for an empty string.
    """

    __slots__ = ("_borders", "_first", "include", "strings")

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        if not all(strings):
            raise ValueError("a stop string must not be empty")
        self.strings = tuple(dict.fromkeys(strings))
        self.include = include
        self._borders = tuple(_borders(s) for s in self.strings)
        self._first = frozenset(s[0] for s in self.strings)

    def __bool__(self) -> bool:
        return bool(self.strings)

    def matcher(self) -> StopMatcher:
        return StopMatcher(self.strings, self._borders, self._first, self.include)


class StopMatcher:
    """Follows one choice's text. Feed it with `push`; after a match `matched` is set for good."""

    __slots__ = ("_borders", "_first", "_held", "_include", "_states", "_strings", "matched")

    def __init__(
        self,
        strings: tuple[str, ...],
        borders: tuple[list[int], ...],
        first: frozenset[str],
        include: bool,
    ) -> None:
        self._strings = strings
        self._borders = borders
        self._first = first
        self._include = include
        self._states = [0] * len(strings)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, armed: bool = True) -> str:
        """Take the next piece of text; return what may be shown now.

        With `armed=False` (fewer than min_tokens so far) strings completed by this piece do not
        stop. Once `matched` is set, the returned text ends right before the stop string, or right
        after it with `include`.
        """
        if not self._held and not any(self._states) and self._first.isdisjoint(text):
            return text
        seen = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            stop = self._advance(char, armed)
            if stop is not None:
                self.matched = stop
                self._held = ""
                return seen[: end if self._include else end - len(stop)]
        hold = 0 if self._include else max(self._states)
        self._held = seen[len(seen) - hold :]
        return seen[: len(seen) - hold]

    def flush(self) -> str:
        """The text held back, when generation ended without a match."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str, armed: bool) -> str | None:
        """Move every automaton by one character; the longest string completed, if any."""
        completed: str | None = None
        for i, (string, border) in enumerate(zip(self._strings, self._borders, strict=True)):
            state = self._states[i]
            while state and string[state] != char:
                state = border[state]
            if string[state] == char:
                state += 1
            if state == len(string):
                if armed and (completed is None or len(string) > len(completed)):
                    completed = string
                state = border[state]
            self._states[i] = state
        return completed


def _borders(string: str) -> list[int]:
    """`borders[k]`: length of the longest proper prefix of `string[:k]` that is also its suffix."""
    borders = [0] * (len(string) + 1)
    state = 0
    for k in range(1, len(string)):
        while state and string[state] != string[k]:
            state = borders[state]
        if string[state] == string[k]:
            state += 1
        borders[k + 1] = state
    return borders
