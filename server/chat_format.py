"""`chat.completion` and `chat.completion.chunk`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from server.choice import Piece
from server.extras import answer_extras, chunk_head, chunk_tail, closing_chunk
from server.generation import Generation
from server.job import Job
from server.logprobs import LogprobFormat


@dataclass(slots=True)
class ChatChunks:
    """Writes the events of one streamed answer.

    What all chunks share is encoded once; a content chunk is that, the escaped text and a tail.
    """

    job: Job
    logprobs: LogprobFormat
    _head: bytes = field(init=False)
    _content: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self._head = chunk_head(self.job, "chat.completion.chunk")
        self._content = [
            self._head + b',"choices":[{"index":%d,"delta":{"content":' % index
            for index in range(self.job.choices)
        ]

    def opening(self, generation: Generation) -> bytes:
        """The role of every choice, once, before anything else."""
        usage = chunk_tail(generation)
        return b"".join(
            start + b'"","role":"assistant"},"logprobs":null,"finish_reason":null}]' + usage
            for start in self._content
        )

    def piece(self, piece: Piece, generation: Generation) -> bytes:
        """A content chunk if there is text, a finish chunk if it is the last."""
        written = b""
        if piece.text or piece.logprobs or piece.tokens:
            written = self._content[piece.index] + orjson.dumps(piece.text)
            written += b'},"logprobs":' + self._logprobs(piece)
            if piece.tokens:
                written += b',"token_ids":' + orjson.dumps(piece.tokens)
            written += b',"finish_reason":null}]' + chunk_tail(generation)
        if piece.finish is not None:
            written += self._head + b',"choices":[{"index":%d,"delta":{},"logprobs":null,' % (
                piece.index
            )
            written += b'"finish_reason":"%b"' % piece.finish.encode()
            written += b',"stop_reason":' + orjson.dumps(piece.stop_reason)
            written += b"}]" + chunk_tail(generation)
        return written

    def closing(self, generation: Generation) -> bytes:
        """The usage chunk, when asked for."""
        return closing_chunk(self._head, generation)

    def _logprobs(self, piece: Piece) -> bytes:
        top = self.job.view.logprobs
        if top is None:
            return b"null"
        return orjson.dumps(self.logprobs.chat(piece.logprobs, top))


def chat_answer(
    generation: Generation, pieces: Sequence[Sequence[Piece]], logprobs: LogprobFormat
) -> dict[str, Any]:
    """The whole answer, from each choice's pieces."""
    job = generation.job
    view = job.view
    choices = []
    for index, parts in enumerate(pieces):
        choice: dict[str, Any] = {
            "index": index,
            "message": {
                "role": "assistant",
                "content": "".join(part.text for part in parts),
                "refusal": None,
            },
            "logprobs": None,
            "finish_reason": parts[-1].finish,
            "stop_reason": parts[-1].stop_reason,
        }
        if view.logprobs is not None:
            entries = [entry for part in parts for entry in part.logprobs]
            choice["logprobs"] = logprobs.chat(entries, view.logprobs)
        if view.token_ids:
            choice["token_ids"] = [token for part in parts for token in part.tokens]
        choices.append(choice)
    answer: dict[str, Any] = {
        "id": job.id,
        "object": "chat.completion",
        "created": job.created,
        "model": job.model,
        "choices": choices,
        "usage": generation.usage().as_json(),
    }
    if view.token_ids:
        answer["prompt_token_ids"] = job.requests[0].prompt
    if view.prompt_logprobs is not None:
        answer["prompt_logprobs"] = logprobs.prompt(
            generation.prompt_scores(0), view.prompt_logprobs
        )
    return answer | answer_extras(generation)
