"""One choice's outputs become text: decoded, searched for stop strings, counted, ended once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.request import Finish, FinishReason, TokenLogprob
from server.job import View
from text.detokenizer import Detokenizer


@dataclass(slots=True)
class LogprobEntry:
    """A token's log-probability and where its text begins, in characters of the output."""

    entry: TokenLogprob
    offset: int


@dataclass(slots=True)
class Piece:
    """What can be shown of one choice after one batch of outputs."""

    index: int  # of the choice in the answer
    text: str = ""
    tokens: list[int] = field(default_factory=list)  # only when token ids were asked for
    logprobs: list[LogprobEntry] = field(default_factory=list)
    finish: str | None = None  # "stop" or "length"; the last piece of a choice has it
    stop_reason: str | int | None = None  # the stop string or the client's stop token


class ChoiceText:
    """The text of one choice as it grows.

    `ended` is set by whichever comes first, a stop string here or the engine's `Finish`; after it,
    tokens are dropped. Tokens count up to the one that completed the stop string; log-probabilities
    of tokens of which nothing is shown are left out.
    """

    __slots__ = (
        "_decoder",
        "_entries",
        "_ids",
        "_length",
        "_matcher",
        "_shown",
        "_view",
        "count",
        "ended",
        "index",
    )

    def __init__(self, index: int, decoder: Detokenizer, view: View) -> None:
        self.index = index
        self.count = 0  # tokens generated and kept
        self.ended = False
        self._decoder = decoder
        self._view = view
        self._matcher = view.stops.matcher() if view.stops else None
        self._length = 0  # characters decoded
        self._shown = 0  # characters returned
        self._entries: list[LogprobEntry] = []  # not yet returned
        self._ids: list[int] = []  # not yet returned

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> Piece:
        """Take what one step brought. With a stop string in it, the piece has `finish`."""
        if not self._view.per_token:
            self.count += len(tokens)
            return Piece(self.index, self._decoder.push(tokens))
        text = ""
        for i, token in enumerate(tokens):
            self.count += 1
            if logprobs:
                self._entries.append(LogprobEntry(logprobs[i], self._length))
            if self._view.token_ids:
                self._ids.append(token)
            text += self._search(self._decoder.push((token,)))
            if self._matched is not None:
                return self._stopped(text)
        return self._piece(text)

    def end(self, finish: Finish) -> Piece:
        """The engine's end, natural ones only: flush what was held back."""
        self.ended = True
        text = self._search(self._decoder.flush())
        if self._matched is not None:  # the last bytes completed it
            return self._stopped(text)
        if self._matcher is not None:
            text += self._matcher.flush()
        stop = finish.stop_token
        if stop is not None:
            self.count += 1
            if self._view.token_ids:
                self._ids.append(stop)
        piece = self._piece(text, everything=True)
        piece.finish = "length" if finish.reason is FinishReason.LENGTH else "stop"
        if stop is not None:  # an end token of the model is not named
            piece.stop_reason = self._view.stop_reasons.get(stop)
        return piece

    @property
    def _matched(self) -> str | None:
        return None if self._matcher is None else self._matcher.matched

    def _search(self, text: str) -> str:
        self._length += len(text)
        if self._matcher is None or not text:
            return text
        return self._matcher.push(text, armed=self.count >= self._view.min_tokens)

    def _stopped(self, text: str) -> Piece:
        self.ended = True
        piece = self._piece(text)
        self._entries.clear()
        piece.finish = "stop"
        piece.stop_reason = self._matched
        piece.tokens.extend(self._ids)
        return piece

    def _piece(self, text: str, *, everything: bool = False) -> Piece:
        """Text with the tokens it belongs to: those that begin before what is now shown."""
        self._shown += len(text)
        piece = Piece(self.index, text)
        if not text and not everything:
            return piece
        ready = len(self._entries)
        if not everything:
            while ready and self._entries[ready - 1].offset >= self._shown:
                ready -= 1
        piece.logprobs, self._entries = self._entries[:ready], self._entries[ready:]
        piece.tokens, self._ids = self._ids, []
        return piece
