"""`Work`: what a row of the coming step is given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.profile import StepShape
from scheduler.sequence import Sequence


@dataclass(slots=True)
class Work:
    """What one row needs, before its pages have names."""

    tokens: int  # of the chunk; 0 for a live row
    drafts: int
    pages: int  # new ones
    ahead: int = 0  # drafts while those are verified


def shape_of(rows: Iterable[tuple[Sequence, Work | None]]) -> StepShape:
    """Of a step with these; None: a live row with no more than its token. What an admission finds
    cached counts as not read, since its sequence does not have it yet."""
    live = drafts = context = 0
    chunks: list[tuple[int, int]] = []
    for sequence, work in rows:
        if work is not None and work.tokens:
            chunks.append((work.tokens, sequence.fed))
        else:
            live += 1
            drafts += 0 if work is None else work.drafts
            context += len(sequence.tokens)
    shape = StepShape(live, live, context).with_drafts(drafts, live)
    for tokens, fed in chunks:
        shape = shape.with_chunk(tokens, fed)
    return shape
