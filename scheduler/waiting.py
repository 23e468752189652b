"""`WaitingQueue`: sequences that do not run, in the order they will be tried."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container, Iterator
from operator import attrgetter

from scheduler.backlog import Backlog
from scheduler.fair_share import Account, FairShare
from scheduler.sequence import Phase, Sequence

_order = attrgetter("order")


class WaitingQueue:
    """One list a tenant, sorted by `Sequence.order`; `FairShare` says whose turn it is.

    A preempted sequence is older than those of its priority that wait, so it comes before them.
    Parked choices are counted but not tried.
    """

    __slots__ = ("_count", "_parked", "_shares", "backlog", "tokens")

    def __init__(self, credit: int = 0) -> None:
        """`credit`: see `FairShare`."""
        self._shares = FairShare(credit)
        self._parked: dict[str, list[Sequence]] = {}  # by request id, in order
        self._count = 0
        self.tokens = 0  # known tokens of all of them, prefix hits not considered
        self.backlog = Backlog()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        return self._shares.turns()

    def turns(self, passed: Container[Account]) -> Iterator[Sequence]:
        """The same, without further sequences of accounts that are put into `passed`."""
        return self._shares.turns(passed)

    def tenants(self, now: float) -> list[Account]:
        """Those that are about, see `FairShare.about`."""
        return self._shares.about(now)

    def served(self, tenant: str) -> int:
        """What fair share would count as served to a tenant that joins the queue now."""
        return self._shares.served(tenant)

    def open(self, tenant: str, sequences: int, now: float) -> Account:
        """The account that new sequences of a tenant belong to, before they are pushed."""
        return self._shares.open(tenant, sequences, now)

    def close(self, sequence: Sequence, now: float) -> None:
        """It has ended: its account expects no more of it."""
        self._shares.close(sequence.account, now)

    def push(self, sequence: Sequence) -> None:
        """Puts a sequence in its place in the queue."""
        sequence.phase = Phase.WAITING
        account = sequence.account
        if not account.queue:
            self._shares.queue(account)
        insort(account.queue, sequence, key=_order)
        self._joined(sequence)

    def park(self, sequence: Sequence) -> None:
        """Keeps a choice back while another one of its request computes the prompt."""
        sequence.phase = Phase.PARKED
        self._parked.setdefault(sequence.request.id, []).append(sequence)
        self._joined(sequence)

    def _joined(self, sequence: Sequence) -> None:
        self._count += 1
        self.tokens += len(sequence.tokens)
        self.backlog.add(sequence)

    def unpark(self, request_id: str, count: int | None = None) -> list[Sequence]:
        """Moves the first `count` parked choices of a request, or all, into the queue."""
        group = self._parked.get(request_id, [])[:count]
        for sequence in group:
            self.remove(sequence)
            self.push(sequence)
        return group

    def remove(self, sequence: Sequence) -> None:
        """Takes a waiting or parked sequence out."""
        if sequence.phase is Phase.PARKED:
            group = self._parked[sequence.request.id]
            group.remove(sequence)
            if not group:
                del self._parked[sequence.request.id]
        else:
            account = sequence.account
            del account.queue[bisect_left(account.queue, sequence.order, key=_order)]
            if not account.queue:
                self._shares.unqueue(account)
        self._count -= 1
        self.tokens -= len(sequence.tokens)
        self.backlog.remove(sequence)

    def check(self) -> None:
        """Raises `AssertionError` unless the queues are sorted and the counts are right."""
        self._shares.check()
        queue = sorted(self._shares.turns(), key=_order)
        parked = [sequence for group in self._parked.values() for sequence in group]
        everyone = [*queue, *parked]
        for account in {sequence.account for sequence in queue}:
            assert account.queue == [s for s in queue if s.account is account]
        assert all(sequence.phase is Phase.WAITING for sequence in queue)
        assert all(sequence.phase is Phase.PARKED for sequence in parked)
        assert len(everyone) == self._count
        assert sum(len(sequence.tokens) for sequence in everyone) == self.tokens
        assert all(not sequence.slot and not sequence.pages for sequence in everyone)
        self.backlog.check(everyone)
