"""Tokens to text, piece by piece.

Both forms keep the same promise: the pieces `push` and `flush` return, joined, depend on the tokens
alone, not on the cuts between calls, and are the decoding of all tokens at once (except that a
byte-fallback decoder gives up a whole run of bytes for one that is invalid, where characters
already shown stay). No piece ends inside a character. Invalid bytes turn into U+FFFD, never raise.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

# Prompt tokens decoded before the first output token, so that it keeps its leading space.
CONTEXT_TOKENS = 6
# A run of undecodable tokens longer than this is shown as it is: each further token costs a decode
# of the whole run.
MAX_PENDING_TOKENS = 256
REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """The text of one choice as it grows."""

    def push(self, tokens: Sequence[int]) -> str:
        """Text completed by these tokens; may be empty."""
        ...

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character cut short, else nothing."""
        ...


class ByteDetokenizer:
    """For byte-level vocabularies, where every token is a known string of bytes.

    Python's `replace` handler and the tokenizers library agree on invalid UTF-8: one U+FFFD for
    each maximal invalid part.
    """

    __slots__ = ("_rest", "_table")

    def __init__(self, table: Sequence[bytes]) -> None:
        """`table[id]`: the bytes of a token, empty for one that is to be skipped."""
        self._table = table
        self._rest = b""  # an incomplete character, at most three bytes

    def push(self, tokens: Sequence[int]) -> str:
        table = self._table
        try:
            if len(tokens) == 1:
                data = self._rest + table[tokens[0]]
            else:
                data = self._rest + b"".join([table[token] for token in tokens])
        except IndexError:  # a padded embedding can produce ids the tokenizer does not know
            known = [table[token] for token in tokens if token < len(table)]
            data = self._rest + b"".join(known)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[used:]
        return text

    def flush(self) -> str:
        text = self._rest.decode("utf-8", "replace")
        self._rest = b""
        return text


class WindowDetokenizer:
    """For every other vocabulary: decode a short window and return how much longer it became.

    The window starts with tokens whose text was already returned, because a decoder may join or
    strip spaces at its start.
    """

    __slots__ = ("_decode", "_prefix", "_shown", "_window")

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int]) -> None:
        """`context`: the prompt's tokens, of which the last few are enough."""
        self._decode = decode
        self._window = list(context[-CONTEXT_TOKENS:])
        self._shown = len(self._window)  # tokens of the window whose text was returned
        # A prompt may end inside a character, which then belongs to the output.
        self._prefix = decode(self._window).rstrip(REPLACEMENT)

    def push(self, tokens: Sequence[int]) -> str:
        return "".join([self._push_one(token) for token in tokens])

    def flush(self) -> str:
        return self._advance(self._decode(self._window))

    def _push_one(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        pending = len(self._window) - self._shown
        if text.endswith(REPLACEMENT) and pending < MAX_PENDING_TOKENS:
            return ""
        return self._advance(text)

    def _advance(self, text: str) -> str:
        """Return what the window has gained, and let it start at the tokens gained."""
        if text.startswith(self._prefix):
            piece = text[len(self._prefix) :]
        else:  # invalid bytes made the decoder give up characters before them
            piece = self._decode(self._window[self._shown :])
        if piece:
            self._window = self._window[self._shown :]
            self._shown = len(self._window)
            self._prefix = self._decode(self._window)
        return piece
