"""`PagePool` against a brute-force model, under random operations."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from scheduler.pages import PagePool
from scheduler.prefix import HashChain, PrefixIndex

NUM_PAGES = 12


class Model:
    """The same pool as a dict of sets and one clock; every question is answered by a full scan."""

    def __init__(self) -> None:
        self.holders: dict[int, set[int]] = {page: set() for page in range(1, NUM_PAGES)}
        self.released = dict.fromkeys(self.holders, 0)  # when it lost its last holder
        self.fence = dict.fromkeys(self.holders, -1)  # the step that must settle first
        self.named: set[int] = set()
        self.clock = 0

    def unheld(self) -> set[int]:
        return {page for page, holders in self.holders.items() if not holders}

    def available(self) -> set[int]:
        return {page for page in self.unheld() if self.fence[page] == -1}

    def next_page(self) -> int:
        """Blank before cached, then the longest released."""
        return min(
            self.available(), key=lambda page: (page in self.named, self.released[page], page)
        )

    def release(self, page: int, holder: int, fence: int | None) -> None:
        self.holders[page].remove(holder)
        if not self.holders[page]:
            self.fence[page] = -1 if fence is None else fence
            self.clock += 1
            self.released[page] = self.clock

    def settle(self, step: int) -> None:
        for page in sorted(self.unheld(), key=self.released.__getitem__):
            if self.fence[page] == step:
                self.fence[page] = -1
                self.clock += 1
                self.released[page] = self.clock


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_lost_by_demoting(seed: int) -> None:
    """Ten thousand operations: every half of a page is always in one place, and what is promised
    comes true."""
    rng = random.Random(seed)
    index = PrefixIndex()
    saved: list[int] = []
    pool = PagePool(24, index, lambda page, link: saved.append(page))
    held: dict[int, list[int]] = {}  # by holder
    steps: list[int] = []  # in flight
    demotions = joined = holder = step = 0
    for _ in range(10_000):
        action = rng.choice(["take", "share", "drop", "name", "launch", "settle", *["demote"] * 3])
        whole = [(name, page) for name, pages in held.items() for page in pages if page > 0]
        if action == "take":
            count = rng.randint(1, 6)
            if count <= pool.available:
                holder += 1
                held[holder] = list(pool.take(count))
        elif action == "share" and whole:
            name, page = rng.choice(whole)
            holder += 1
            held[holder] = held[name][: held[name].index(page) + 1]
            if min(held[holder]) < 0:
                del held[holder]
            else:
                pool.pin(held[holder])
        elif action == "drop" and held:
            name = rng.choice(sorted(held))
            before = pool.available + pool.fenced, pool.free_halves
            freed = pool.freed_by_dropping(held[name], Counter())
            pool.drop(held.pop(name), steps[-1] if steps else None)
            more = pool.available + pool.fenced - before[0]
            assert freed <= more <= freed + before[1]
            joined += more - freed
        elif action == "name" and whole:
            _, page = rng.choice(whole)
            if page not in index:
                index.register(page, HashChain(b"", 1).link(0, [rng.getrandbits(31)]))
        elif action == "launch" and len(steps) < 3:
            step += 1
            steps.append(step)
        elif action == "settle" and steps:
            before = pool.available + pool.fenced
            pool.lift(steps.pop(0))
            assert pool.available + pool.fenced == before
            assert steps or not pool.fenced
        elif action == "demote":
            mine = [(name, page) for name, page in whole if pool.demotable(page)]
            if mine:
                name, page = rng.choice(mine)
                named, free, before = page in index, pool.free_halves, pool.available
                half = pool.demote(page)
                held[name][held[name].index(page)] = half
                assert pool.available == before + (free > 0)
                assert pool.free_halves == free + (-1 if free else 1)
                assert not named or saved.pop() == page
                assert page not in index
                demotions += 1
        pool.check(Counter(page for pages in held.values() for page in pages))
    assert demotions > 200
    assert joined > 10, "a half whose other half is free"
    for name in list(held):
        pool.drop(held.pop(name), None)
    while steps:
        pool.lift(steps.pop(0))
    pool.check(Counter())
    assert (pool.available, pool.fenced, pool.free_halves) == (pool.total, 0, 0)


@pytest.mark.parametrize("seed", range(40))
def test_any_sequence_of_operations_matches_the_model(seed: int) -> None:
    rng = random.Random(seed)
    index = PrefixIndex()
    pool, model = PagePool(NUM_PAGES, index), Model()
    held: dict[int, list[int]] = {}  # by holder: its pages, in order
    steps: list[int] = []  # in flight
    holder = step = 0
    for _ in range(300):
        action = rng.choice(["take", "share", "drop", "name", "launch", "settle"])
        if action == "take":
            count = rng.randint(1, 4)
            if count <= len(model.available()):
                holder += 1
                expected = []
                for _ in range(count):
                    page = model.next_page()
                    model.named.discard(page)
                    model.holders[page].add(holder)
                    expected.append(page)
                held[holder] = expected
                assert list(pool.take(count)) == expected
        elif action == "share" and model.named:
            pages = rng.sample(sorted(model.named), rng.randint(1, len(model.named)))
            cost = pool.cost_of_pinning(pages, set())
            before = pool.available
            pool.pin(pages)
            assert before - pool.available == cost
            holder += 1
            held[holder] = pages
            for page in pages:
                model.holders[page].add(holder)
        elif action == "drop" and held:
            name = rng.choice(sorted(held))
            fence = steps[-1] if steps else None
            freed = pool.freed_by_dropping(held[name], Counter())
            before = pool.available + pool.fenced
            for page in reversed(held[name]):
                model.release(page, name, fence)
            pool.drop(held.pop(name), fence)
            assert pool.available + pool.fenced - before == freed
        elif action == "name" and held:
            page = rng.choice(held[rng.choice(sorted(held))])
            if page not in model.named:
                model.named.add(page)
                index.register(page, HashChain(b"", 1).link(0, [rng.getrandbits(31)]))
        elif action == "launch" and len(steps) < 3:
            step += 1
            steps.append(step)
        elif action == "settle" and steps:
            settled = steps.pop(0)
            model.settle(settled)
            pool.lift(settled)
        pool.check(Counter(page for pages in held.values() for page in pages))
        assert pool.available == len(model.available())
        assert pool.fenced == len(model.unheld()) - len(model.available())
        assert pool.cached == len(model.available() & model.named)
        everything = pool.available + pool.fenced + sum(map(bool, model.holders.values()))
        assert everything == pool.total == NUM_PAGES - 1


def test_a_prefix_dies_from_its_end() -> None:
    index = PrefixIndex()
    pool = PagePool(5, index)
    chain, tokens = HashChain(b"", 1), [10, 11, 12, 13]
    pages = pool.take(4)
    for i, page in enumerate(pages):
        index.register(page, chain.link(i, tokens))
    pool.drop(pages, None)
    for left in (3, 2, 1):
        pool.take(1)
        assert index.match(chain, tokens, 4) == list(pages[:left])


def test_shared_pages_count_once_when_their_holders_go_together() -> None:
    pool = PagePool(5, PrefixIndex())
    pages = pool.take(3)
    pool.pin(pages[:2])
    dropped: Counter[int] = Counter()
    assert pool.freed_by_dropping(pages, dropped) == 1
    assert pool.freed_by_dropping(pages[:2], dropped) == 2


def test_a_hit_in_a_fence_leaves_it() -> None:
    index = PrefixIndex()
    pool = PagePool(3, index)
    (page,) = pool.take(1)
    index.register(page, HashChain(b"", 1).link(0, [5]))
    pool.drop([page], fence=1)
    assert (pool.available, pool.fenced) == (1, 1)
    pool.pin([page])
    assert pool.fenced == 0
    pool.lift(1)
    assert pool.available == 1, "held, so it stays out of reach"
    pool.drop([page], fence=2)
    pool.lift(2)
    assert pool.available == 2


def test_the_check_sees_a_lost_page() -> None:
    pool = PagePool(4, PrefixIndex())
    pages = pool.take(2)
    with pytest.raises(AssertionError, match="lost"):
        pool.check(Counter(pages[:1]))
