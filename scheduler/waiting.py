"""`WaitingQueue`: sequences that do not run, in the order they will be tried."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from scheduler.sequence import Phase, Sequence

_order = attrgetter("order")


class WaitingQueue:
    """Sorted by `Sequence.order`; siblings parked behind a first choice count but are not tried."""

    __slots__ = ("_parked", "_queue", "tokens")

    def __init__(self) -> None:
        self._queue: list[Sequence] = []
        self._parked: dict[str, list[Sequence]] = {}  # by request id
        self.tokens = 0  # over all of them: what is to be computed, prefix hits not considered

    def __len__(self) -> int:
        return len(self._queue) + sum(map(len, self._parked.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def push(self, sequence: Sequence) -> None:
        sequence.phase = Phase.WAITING
        insort(self._queue, sequence, key=_order)
        self.tokens += len(sequence.tokens)

    def remove(self, sequence: Sequence) -> None:
        """Takes a waiting or parked sequence out."""
        if sequence.phase is Phase.PARKED:
            parked = self._parked[sequence.request.id]
            parked.remove(sequence)
            if not parked:
                del self._parked[sequence.request.id]
        else:
            del self._queue[bisect_left(self._queue, sequence.order, key=_order)]
        self.tokens -= len(sequence.tokens)

    def park(self, sequence: Sequence) -> None:
        sequence.phase = Phase.PARKED
        self._parked.setdefault(sequence.request.id, []).append(sequence)
        self.tokens += len(sequence.tokens)

    def unpark(self, request_id: str) -> list[Sequence]:
        """Moves a request's parked choices into the queue."""
        parked = self._parked.pop(request_id, [])
        for sequence in parked:
            self.tokens -= len(sequence.tokens)
            self.push(sequence)
        return parked

    def check(self) -> None:
        """Raises `AssertionError` unless the queue is sorted and its token count right."""
        everyone = [*self._queue, *(s for group in self._parked.values() for s in group)]
        assert self._queue == sorted(self._queue, key=_order)
        assert self.tokens == sum(len(s.tokens) for s in everyone)
        assert all(s.slot == 0 and not s.pages for s in everyone)
