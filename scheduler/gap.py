"""`GapBudget`: how much prompt a step may hold while it keeps running streams waiting.

A live sequence gets its tokens step by step, and steps follow each other without a pause, so the
gap between two outputs is the time of one step. Prompts fill what the target leaves of it.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.profile import StepShape, chunk_pairs
from scheduler.sequence import Sequence
from scheduler.step_cost import StepCost


class GapBudget:
    """Chunk tokens by what they add to the time of one step."""

    __slots__ = ("_cost", "_least", "_seconds", "_shape")

    def __init__(self, cost: StepCost, seconds: float, live: StepShape, page_size: int) -> None:
        """`seconds` are those that a step may take. `live` is the step without chunks. However slow
        that is, a page of prompt fits."""
        self._cost = cost
        self._seconds = seconds
        self._shape = live
        self._least = page_size

    def room(self, context: int, most: int) -> int:
        """How many tokens, up to `most`, one more chunk may have after `context` positions."""
        within = self._cost.tokens_within(self._seconds, self._shape, context, most)
        return min(max(within, self._least), most)

    def add(self, tokens: int, context: int) -> None:
        """The step holds such a chunk."""
        self._shape = self._shape.with_chunk(tokens, context)
        self._least = max(self._least - tokens, 0)

    def remove(self, tokens: int, context: int) -> None:
        """It does not, after all."""
        shape = self._shape
        self._shape = StepShape(
            shape.rows - 1,
            shape.tokens - tokens,
            shape.decode_context,
            shape.chunk_pairs - chunk_pairs(tokens, context),
        )
        self._least += tokens


def gap_target(target: float | None, live: Iterable[Sequence]) -> float | None:
    """The strictest of the server's target and those of the sequences that get a token."""
    for sequence in live:
        own = sequence.request.mtpot_target
        if own is not None and (target is None or own < target):
            target = own
    return target
