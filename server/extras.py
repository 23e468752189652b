"""What both formats share: usage, timings and metadata, as far as they were asked for."""

from __future__ import annotations

from typing import Any

import orjson

from server.generation import Generation
from server.job import Job


def answer_extras(generation: Generation) -> dict[str, Any]:
    """Further fields of an answer."""
    extras: dict[str, Any] = {}
    if generation.job.view.timings:
        extras["metrics"] = generation.timings()
    if generation.job.view.metadata is not None:
        extras["metadata"] = generation.job.view.metadata
    return extras


def chunk_head(job: Job, kind: str) -> bytes:
    """What every event of an answer begins with; `kind` is its `object`."""
    shared = {"id": job.id, "object": kind, "created": job.created, "model": job.model}
    return b"data: " + orjson.dumps(shared)[:-1]


def chunk_tail(generation: Generation) -> bytes:
    """The end of an event: usage so far, when asked for on every chunk."""
    if not generation.job.view.usage_always:
        return b"}\n\n"
    return b',"usage":' + orjson.dumps(generation.usage().as_json()) + b"}\n\n"


def closing_chunk(head: bytes, generation: Generation) -> bytes:
    """A chunk without choices, if there is anything for it. `head`: the fields all chunks share."""
    extras = answer_extras(generation)
    if generation.job.view.usage_at_end:
        extras = {"usage": generation.usage().as_json(), **extras}
    if not extras:
        return b""
    return head + b',"choices":[],' + orjson.dumps(extras)[1:] + b"\n\n"
