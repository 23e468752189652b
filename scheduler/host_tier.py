"""`HostTier`: pages in host memory, the second level of the prefix index.

A page is written here when it is about to be overwritten on the device although a paused sequence
still counts on it: nothing is copied that would have stayed. The copy runs in the step that gives
the page to its next owner, before anything else of that step, so no page is ever given out unsaved.
What is read back stays for whoever needs it next, until the room is needed; and since an end is of
no use without its beginning, pages that lead to one here are saved as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from scheduler.pages import PagePool
from scheduler.plan import PageCopy
from scheduler.prefix import Link, PrefixIndex
from scheduler.sequence import Sequence


class HostTier:
    """Which links have a copy in host memory, and which shall get one.

    A paused sequence keeps a prefix of its pages, link by link. Of each kept link one is true:

    - it has a host page, which holds one reference for every sequence that keeps the link;
    - it is wanted: should its page on the device be evicted, it is saved then.

    A host page nobody keeps is cached, as on the device, and the one longest so goes first. Host
    page 0 is never used, so that one allocator serves both tiers.
    """

    def __init__(self, pages: int) -> None:
        self._index = PrefixIndex()
        self._pool = PagePool(pages + 1, self._index, self._forgotten)
        self._kept: dict[Sequence, list[Link]] = {}
        self._wanted: Counter[Link] = Counter()  # by how many sequences
        self._leads: Counter[bytes] = Counter()  # digests by how many pages here come right after
        self._saves: list[PageCopy] = []  # of the plan that is being made
        self.swapped_out = self.swapped_in = 0  # pages copied since the start

    @property
    def total(self) -> int:
        return self._pool.total

    @property
    def held(self) -> int:
        """Pages that a paused sequence keeps, or that a step in flight reads."""
        return self._pool.total - self._pool.available

    def find(self, link: Link) -> int | None:
        return self._index.find(link)

    # --- pausing --------------------------------------------------------------------------------

    def keep(self, sequence: Sequence, links: Iterable[Link]) -> None:
        """Keeps the first of a paused sequence's pages, as many as there is room for."""
        pool, wanted = self._pool, self._wanted
        kept = self._kept[sequence] = []
        for link in links:
            page = self._index.find(link)
            costs = link not in wanted if page is None else pool.cost_of_pinning((page,), ())
            if costs and pool.available <= len(wanted):
                return
            if page is None:
                wanted[link] += 1
            else:
                pool.pin((page,))
            kept.append(link)

    def release(self, sequence: Sequence, fence: int | None) -> None:
        """Ends what `keep` began; `fence` is the newest step that may read or write its pages."""
        pages: list[int] = []
        for link in self._kept.pop(sequence, ()):
            page = self._index.find(link)
            if page is not None:
                pages.append(page)
            elif self._wanted[link] > 1:
                self._wanted[link] -= 1
            else:
                del self._wanted[link]
        self._pool.drop(pages, fence)

    # --- copying --------------------------------------------------------------------------------

    def evicted(self, source: int, link: Link) -> None:
        """The device gives the page of a link to somebody else: saves it if it is needed."""
        keepers = self._wanted.get(link, 0)
        spare = self._pool.available - (0 if keepers else len(self._wanted))
        needed = keepers or (link.digest in self._leads and self.find(link) is None)
        if not needed or spare < 1:  # without room it will be computed again
            return
        (target,) = self._pool.take(1)
        self._index.register(target, link)
        if target in self._index:  # or another link has the same digest
            self._pool.pin([target] * keepers)
            self._wanted.pop(link, None)
            self._leads[link.parent] += 1
            self._saves.append(PageCopy(source, target))
            self.swapped_out += 1
        self._pool.drop((target,), None)

    def _forgotten(self, page: int, link: Link) -> None:
        """A host page is about to be overwritten."""
        if self._leads[link.parent] > 1:
            self._leads[link.parent] -= 1
        else:
            del self._leads[link.parent]

    def take_saves(self) -> tuple[PageCopy, ...]:
        """The copies that the plan being made must begin with."""
        saves, self._saves = tuple(self._saves), []
        return saves

    def pin(self, pages: Iterable[int]) -> None:
        """Keeps pages from being overwritten until `loaded`."""
        self._pool.pin(pages)

    def loaded(self, pages: Collection[int], step: int) -> None:
        """A step reads these pinned pages: they are free when it has settled."""
        self._pool.drop(tuple(pages), step)
        self.swapped_in += len(pages)

    def lift(self, step: int) -> None:
        """A step has settled: its copies are done."""
        self._pool.lift(step)

    def check(self, waiting: Collection[Sequence]) -> None:
        """Raises `AssertionError` unless every page and every kept link is accounted for."""
        assert not self._saves, "a save without a plan"
        assert self._kept.keys() <= set(waiting), "kept for somebody who does not wait"
        held: Counter[int] = Counter()
        wanted: Counter[Link] = Counter()
        for link in (link for links in self._kept.values() for link in links):
            page = self._index.find(link)
            if page is None:
                wanted[link] += 1
            else:
                held[page] += 1
        assert wanted == self._wanted, "wanted"
        assert Counter(link.parent for link in self._index.links()) == self._leads, "leads"
        self._pool.check(held)
