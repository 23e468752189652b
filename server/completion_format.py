"""`text_completion`, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from server.choice import Piece
from server.extras import answer_extras, chunk_head, chunk_tail, closing_chunk
from server.generation import Generation
from server.job import Job
from server.logprobs import LogprobFormat, joined


@dataclass(slots=True)
class CompletionChunks:
    """Writes the events of one streamed completion."""

    job: Job
    logprobs: LogprobFormat
    _head: bytes = field(init=False)
    _text: list[bytes] = field(init=False)
    _echoed: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._head = chunk_head(self.job, "text_completion")
        self._text = [
            self._head + b',"choices":[{"index":%d,"text":' % index
            for index in range(self.job.choices)
        ]

    def opening(self, generation: Generation) -> bytes:
        """Completions open with their first text."""
        return b""

    def piece(self, piece: Piece, generation: Generation) -> bytes:
        written = self._echo(piece.index, generation)
        if piece.text or piece.logprobs or piece.tokens:
            written += self._text[piece.index] + orjson.dumps(piece.text)
            written += b',"logprobs":' + self._logprobs(piece)
            if piece.tokens:
                written += b',"token_ids":' + orjson.dumps(piece.tokens)
            written += b',"finish_reason":null}]' + chunk_tail(generation)
        if piece.finish is not None:
            written += self._text[piece.index] + b'"","logprobs":null,"finish_reason":"%b"' % (
                piece.finish.encode()
            )
            written += b',"stop_reason":' + orjson.dumps(piece.stop_reason)
            written += b"}]" + chunk_tail(generation)
        return written

    def closing(self, generation: Generation) -> bytes:
        return closing_chunk(self._head, generation)

    def _echo(self, index: int, generation: Generation) -> bytes:
        """The prompt as the first chunk of its choice."""
        view = self.job.view
        if not view.echo or index in self._echoed:
            return b""
        self._echoed.add(index)
        shown = orjson.dumps(self.job.prompt_texts[index // self.job.n])
        scores = echo_logprobs(generation, index, self.logprobs)
        return (
            self._text[index]
            + shown
            + b',"logprobs":'
            + orjson.dumps(scores)
            + b',"finish_reason":null}]'
            + chunk_tail(generation)
        )

    def _logprobs(self, piece: Piece) -> bytes:
        view = self.job.view
        if view.logprobs is None:
            return b"null"
        return orjson.dumps(
            self.logprobs.completion(piece.logprobs, view.logprobs, shift(self.job, piece.index))
        )


def completion_answer(
    generation: Generation, pieces: Sequence[Sequence[Piece]], logprobs: LogprobFormat
) -> dict[str, Any]:
    """The whole answer, from each choice's pieces."""
    job = generation.job
    view = job.view
    choices = []
    for index, parts in enumerate(pieces):
        echo = job.prompt_texts[index // job.n] if view.echo else ""
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + "".join(part.text for part in parts),
            "logprobs": None,
            "finish_reason": parts[-1].finish,
            "stop_reason": parts[-1].stop_reason,
        }
        if view.logprobs is not None:
            entries = [entry for part in parts for entry in part.logprobs]
            scores = logprobs.completion(entries, view.logprobs, shift(job, index))
            echoed = echo_logprobs(generation, index, logprobs)
            choice["logprobs"] = scores if echoed is None else joined((echoed, scores))
        if view.token_ids:
            choice["token_ids"] = [token for part in parts for token in part.tokens]
            choice["prompt_token_ids"] = job.requests[index // job.n].prompt
        if view.prompt_logprobs is not None:
            choice["prompt_logprobs"] = logprobs.prompt(
                generation.prompt_scores(index), view.prompt_logprobs
            )
        choices.append(choice)
    answer: dict[str, Any] = {
        "id": job.id,
        "object": "text_completion",
        "created": job.created,
        "model": job.model,
        "choices": choices,
        "usage": generation.usage().as_json(),
    }
    return answer | answer_extras(generation)


def echo_logprobs(
    generation: Generation, index: int, logprobs: LogprobFormat
) -> dict[str, Any] | None:
    """The prompt's log-probabilities for an echo; None when not asked for."""
    job = generation.job
    if not job.view.echo or job.view.logprobs is None:
        return None
    prompt = job.requests[index // job.n].prompt
    return logprobs.echo(prompt, generation.prompt_scores(index), job.view.logprobs)


def shift(job: Job, index: int) -> int:
    """Characters shown before the generated text."""
    return len(job.prompt_texts[index // job.n]) if job.view.echo else 0
