"""`FairShare`: whose turn it is among tenants. Each has a counter of the tokens it was served.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024):
the tenant with the smallest counter among those that wait goes next. Who comes back from a pause is
lifted to the smallest counter of those that wait, less a credit, so nobody saves more than that up
by staying away; what it was served beyond that is remembered. So of two tenants that always have
somebody waiting, neither is served more than a constant ahead of the other, however long that
lasts.

The credit is not the paper's. Without it a tenant that asks for less than its share, but often, is
lifted to the flood by each request, charged for its prompt, and ahead of the flood for the next.

Priority decides inside a tenant alone: clients set it themselves, and a tenant that calls all its
requests urgent must not be served more for it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.sequence import Sequence

# What a token costs its tenant. An output token takes a step of its own, a prompt token shares one
# with many; the paper's weights, which are also about what providers charge.
PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2

LATELY = 300.0  # seconds for which a tenant counts as about after its last request

_SWEEP = 16  # accounts beyond twice those kept by the last sweep


@dataclass(slots=True, eq=False)
class Account:
    """What one tenant was served, and what it has in the queue."""

    tenant: str
    served: int = 0  # weighted tokens
    unfinished: int = 0  # sequences, wherever they are
    seen: float = 0.0  # when it last brought or ended one
    # Those that wait, sorted by order.
    queue: list[Sequence] = field(default_factory=list, repr=False)


class FairShare:
    """The accounts of all tenants that have something here, or were served ahead of others."""

    __slots__ = ("_accounts", "_credit", "_last", "_queued", "_reached", "_sweep_at")

    def __init__(self, credit: int = 0) -> None:
        """`credit`: weighted tokens."""
        self._credit = credit
        self._reached = 0  # the floor when somebody last began to wait
        self._accounts: dict[str, Account] = {}
        self._queued: dict[str, Account] = {}  # those with somebody in the queue
        self._last = Account("")  # the last to leave the queue
        self._sweep_at = _SWEEP

    def __len__(self) -> int:
        return len(self._accounts)

    def about(self, now: float) -> list[Account]:
        """Tenants that have something here, or had lately."""
        since = now - LATELY
        return [a for a in self._accounts.values() if a.unfinished or a.seen >= since]

    def open(self, tenant: str, sequences: int, now: float) -> Account:
        """The account of a tenant that brings so many sequences."""
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= self._sweep_at:
                self._sweep(now)
            account = self._accounts[tenant] = Account(tenant)
        account.unfinished += sequences
        account.seen = now
        return account

    def served(self, tenant: str) -> int:
        """What a tenant counts as served once it waits."""
        account = self._accounts.get(tenant)
        served = 0 if account is None else account.served
        return served if tenant in self._queued else max(served, self._floor() - self._credit)

    def close(self, account: Account, now: float) -> None:
        """One of its sequences has ended. When nobody has any left, all begin anew as equals."""
        account.unfinished -= 1
        account.seen = now
        if not account.unfinished and not any(a.unfinished for a in self._accounts.values()):
            self._accounts.clear()
            self._last = Account("")
            self._reached = 0

    def queue(self, account: Account) -> None:
        """Its first sequence is about to wait."""
        self._reached = self._floor()
        account.served = max(account.served, self._reached - self._credit)
        self._queued[account.tenant] = account

    def unqueue(self, account: Account) -> None:
        """None of its sequences waits any more."""
        del self._queued[account.tenant]
        self._last = account

    def turns(self, passed: Container[Account] = ()) -> Iterator[Sequence]:
        """All sequences that wait, as if each were admitted when the next is asked for.

        It is charged its whole prompt then, in a ledger of this pass alone. Equal counters go by
        age. With one tenant, that is the tenant's own order; tenants that are put into `passed`
        have no more turns.
        """
        if len(self._queued) == 1:
            for account in self._queued.values():
                return iter(account.queue)
        return self._interleaved(passed)

    def _interleaved(self, passed: Container[Account]) -> Iterator[Sequence]:
        # Serials are unique, so accounts are never compared.
        turns = [(a.served, a.queue[0].order[1], a, 0) for a in self._queued.values()]
        heapify(turns)
        while turns:
            served, _, account, i = turns[0]
            sequence = account.queue[i]
            yield sequence
            i += 1
            if i == len(account.queue) or account in passed:
                heappop(turns)
                continue
            if sequence.admitted is None:
                served += PROMPT_WEIGHT * len(sequence.tokens)
            heapreplace(turns, (served, account.queue[i].order[1], account, i))

    def _floor(self) -> int:
        """What those who wait were served at least. It never falls, though who comes on credit has
        less."""
        if self._queued:
            return max(min(a.served for a in self._queued.values()), self._reached)
        return max(self._last.served, self._reached)

    def _sweep(self, now: float) -> None:
        """Forgets who would come back as a newcomer does, and was not seen lately."""
        floor, since = self._floor() - self._credit, now - LATELY
        self._accounts = {
            tenant: a
            for tenant, a in self._accounts.items()
            if a.unfinished or a.served > floor or a.seen >= since
        }
        self._sweep_at = 2 * len(self._accounts) + _SWEEP

    def check(self) -> None:
        """Raises `AssertionError` unless exactly those with a queue are marked as waiting."""
        queued = {tenant: a for tenant, a in self._accounts.items() if a.queue}
        assert self._queued == queued
        assert all(0 <= len(a.queue) <= a.unfinished for a in self._accounts.values())
        assert all(a.served >= self._reached - self._credit for a in queued.values())
