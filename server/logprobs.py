"""Log-probabilities in the three shapes clients know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler.request import TokenLogprob
from server.choice import LogprobEntry
from text.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no -inf


@dataclass(frozen=True, slots=True)
class LogprobFormat:
    """Names tokens by their text, or as `token_id:N`."""

    tokenizer: Tokenizer
    as_ids: bool = False

    def label(self, token: int) -> str:
        return f"token_id:{token}" if self.as_ids else self.tokenizer.token_label(token)

    def chat(self, entries: Iterable[LogprobEntry], top: int) -> dict[str, Any]:
        """`logprobs` of a chat choice; the `bytes`, joined, are the text."""
        content = []
        for item in entries:
            shown = self._chat_token(item.entry.token, item.entry.logprob)
            shown["top_logprobs"] = [self._chat_token(t, p) for t, p in item.entry.top[:top]]
            content.append(shown)
        return {"content": content, "refusal": None}

    def completion(self, entries: Iterable[LogprobEntry], top: int, shift: int) -> dict[str, Any]:
        """`logprobs` of a completion; `shift` is where its text begins in the shown text."""
        tokens: list[str] = []
        own: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for item in entries:
            tokens.append(self.label(item.entry.token))
            own.append(finite(item.entry.logprob))
            tops.append(self._top(item.entry, top))
            offsets.append(item.offset + shift)
        return {
            "tokens": tokens,
            "token_logprobs": own,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def echo(
        self, prompt: Sequence[int], entries: Sequence[TokenLogprob | None], top: int
    ) -> dict[str, Any]:
        """The prompt's part of an echoed completion's `logprobs`; the first token has none."""
        offsets, offset = [], 0
        decoder = self.tokenizer.detokenizer(())
        for token in prompt:
            offsets.append(offset)
            offset += len(decoder.push((token,)))
        return {
            "tokens": [self.label(token) for token in prompt],
            "token_logprobs": [None if e is None else finite(e.logprob) for e in entries],
            "top_logprobs": [None if e is None else self._top(e, top) for e in entries],
            "text_offset": offsets,
        }

    def prompt(
        self, entries: Sequence[TokenLogprob | None], top: int
    ) -> list[dict[str, dict[str, Any]] | None]:
        """`prompt_logprobs`: for each prompt token a mapping from token id, null for the first."""
        return [None if entry is None else self._ranked(entry, top) for entry in entries]

    def _chat_token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.label(token),
            "logprob": finite(logprob),
            "bytes": list(self.tokenizer.token_bytes(token)),
        }

    def _top(self, entry: TokenLogprob, top: int) -> dict[str, float]:
        """The most likely tokens and, as OpenAI has it, the token itself."""
        shown = {self.label(token): finite(logprob) for token, logprob in entry.top[:top]}
        shown.setdefault(self.label(entry.token), finite(entry.logprob))
        return shown

    def _ranked(self, entry: TokenLogprob, top: int) -> dict[str, dict[str, Any]]:
        ranked = {
            token: (logprob, rank) for rank, (token, logprob) in enumerate(entry.top[:top], start=1)
        }
        ranked.setdefault(entry.token, (entry.logprob, entry.rank))
        return {
            str(token): {
                "logprob": finite(logprob),
                "rank": rank,
                "decoded_token": self.tokenizer.token_label(token),
            }
            for token, (logprob, rank) in ranked.items()
        }


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Consecutive parts of one completion's logprobs as one."""
    return {key: [x for part in parts for x in part[key]] for key in parts[0]}
