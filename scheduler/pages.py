"""`PagePool`: who holds which page, and which page is given out next."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence

from scheduler.prefix import Link, PrefixIndex

NULL_PAGE = 0  # padded rows read and write here; it is never given out


class PagePool:
    """Reference counts and reuse order of `num_pages` pages, of which page 0 is never given out.

    A page is in exactly one place:

    - held: referenced by one or more sequences;
    - fenced: released while a step was in flight, out of reach until that step settles;
    - cached: unreferenced, still named by the prefix index, oldest release first;
    - blank: unreferenced and nameless.

    Blank pages are given out before cached ones, and cached ones oldest first. Sequences release
    their pages last page first, so the end of a cached prefix goes before its beginning.

    What a page holds can be demoted to half of a page, which has the number ~(2 * page) or
    ~(2 * page + 1) and one holder. The half that is let go first is fenced, then free for what is
    demoted next; a page both of whose halves are nobody's is one page again.

    `evicted` hears of each named page whose name is withdrawn, before anything is written to it.
    """

    __slots__ = (
        "_blank",
        "_cached",
        "_evicted",
        "_fence_of",
        "_fenced",
        "_fences",
        "_free_halves",
        "_index",
        "_refs",
        "sharing",
    )

    def __init__(
        self,
        num_pages: int,
        index: PrefixIndex,
        evicted: Callable[[int, Link], None] | None = None,
    ) -> None:
        self._index = index
        self._evicted = evicted
        self._refs = [0] * num_pages
        self.sharing = 0  # pages with more than one holder
        self._blank = deque(range(1, num_pages))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._fences: dict[int, dict[int, None]] = {}  # by step: pages released under it, in order
        self._fence_of: dict[int, int] = {}  # by fenced page: the step that must settle
        self._fenced = 0  # of these, whole ones
        self._free_halves: dict[int, None] = {}  # oldest first

    @property
    def total(self) -> int:
        return len(self._refs) - 1

    @property
    def available(self) -> int:
        """Pages that `take` can give now."""
        return len(self._blank) + len(self._cached)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def fenced(self) -> int:
        """Pages that become available when the steps in flight settle."""
        return self._fenced

    @property
    def free_halves(self) -> int:
        """Pages that can be demoted at once into what others have left."""
        return len(self._free_halves)

    def held(self, page: int) -> bool:
        """Whether a sequence holds the page."""
        return self._refs[page] > 0

    def demotable(self, page: int) -> bool:
        """Whether it is whole, and one sequence alone holds it."""
        return page > 0 and self._refs[page] == 1

    def shared(self, pages: Sequence[int]) -> int:
        """How many of a sequence's first pages others hold too. None is counted behind a half.

        Who holds a page of a prefix holds those before it, so they end at one point. Only where
        several computed the same page at once each has its own, which may be demoted, before pages
        that they share.
        """
        refs = self._refs
        if not pages or refs[pages[0]] < 2:
            return 0
        end = bisect_left(pages, True, key=lambda page: page < 0 or refs[page] < 2)
        if min(pages[:end]) > 0:
            return end
        return next(i for i, page in enumerate(pages) if page < 0)

    def take(self, count: int) -> tuple[int, ...]:
        """`count` pages for one new owner. The caller has made sure that they are available."""
        return tuple([self._take() for _ in range(count)])

    def _take(self) -> int:
        if self._blank:
            page = self._blank.popleft()
        else:
            page, _ = self._cached.popitem(last=False)
            self.forget(page)
        self._refs[page] = 1
        return page

    def forget(self, page: int) -> None:
        """Withdraws the page's name, if it has one."""
        if page in self._index:
            link = self._index.forget(page)
            if self._evicted is not None:
                self._evicted(page, link)

    def demote(self, page: int) -> int:
        """Moves a demotable page into the half of a page that it returns: into a free one if there
        is any, and then the page is blank; else into one of its own, and then the other is free."""
        self.forget(page)
        self._refs[page] = 0
        if self._free_halves:
            half = next(iter(self._free_halves))
            del self._free_halves[half]
            self._blank.append(page)
        else:
            half = ~(2 * page)
            self._free_halves[half ^ 1] = None
        return half

    def pin(self, pages: Iterable[int]) -> None:
        """One more reference to each page of a prefix hit, wherever the page is now."""
        for page in pages:
            if self._refs[page] == 0:
                fence = self._fence_of.pop(page, None)
                self._fenced -= fence is not None
                del (self._cached if fence is None else self._fences[fence])[page]
            self._refs[page] += 1
            self.sharing += self._refs[page] == 2

    def drop(self, pages: Sequence[int], fence: int | None) -> None:
        """One reference less to each page, last page first.

        `fence` is the newest step in flight: it may still write to what is released here.
        """
        for page in reversed(pages):
            if page < 0:
                page = self._joined(page)
            else:
                self._refs[page] -= 1
                self.sharing -= self._refs[page] == 1
                if self._refs[page]:
                    continue
            if fence is None:
                self._rest(page)
            else:
                self._fence_of[page] = fence
                self._fenced += page > 0
                self._fences.setdefault(fence, {})[page] = None

    def _joined(self, half: int) -> int:
        """A half that was let go; or its page, if the other half is nobody's."""
        other = half ^ 1
        if other in self._free_halves:
            del self._free_halves[other]
        elif other in self._fence_of:
            del self._fences[self._fence_of.pop(other)][other]
        else:
            return half
        return ~half >> 1

    def lift(self, step: int) -> bool:
        """Makes the pages available that waited for this step. True if there were any."""
        pages = self._fences.pop(step, {})
        for page in pages:
            del self._fence_of[page]
            self._fenced -= page > 0
            self._rest(page)
        return bool(pages)

    def _rest(self, page: int) -> None:
        if page < 0:
            self._free_halves[page] = None
        elif page in self._index:
            self._cached[page] = None
        else:
            self._blank.append(page)

    def cost_of_pinning(self, pages: Iterable[int], pinned: Collection[int]) -> int:
        """By how much `available` shrinks when these pages, beyond `pinned`, are pinned."""
        return sum(page in self._cached and page not in pinned for page in pages)

    def freed_by_dropping(self, pages: Iterable[int], dropped: Counter[int]) -> int:
        """How many pages lose their last reference when these are dropped after `dropped`.

        Adds them to `dropped`, so that a page shared by two victims is counted once. Of halves, the
        second of a page counts; not if the first is free, for it may be in use again by then.
        """
        freed = 0
        for page in pages:
            dropped[page] += 1
            if page > 0:
                freed += self._refs[page] == dropped[page]
            else:
                freed += page ^ 1 in dropped or page ^ 1 in self._fence_of
        return freed

    def check(self, held: Counter[int]) -> None:
        """Raises `AssertionError` unless every page is in exactly one place.

        `held` counts the references of all sequences.
        """
        single = [*self._free_halves, *(place for place in self._fence_of if place < 0)]
        assert all(half ^ 1 in held for half in single), "a page in two halves that nobody holds"
        places = [*self._blank, *self._cached, *self._fence_of, *self._free_halves, *held]
        halves = [half for page in places for half in _halves(page)]
        everything = list(range(2, 2 * len(self._refs)))
        assert sorted(halves) == everything, "a page is lost or in two places"
        assert self._fenced == sum(page > 0 for page in self._fence_of), "fenced"
        assert self.sharing == sum(count > 1 for count in held.values()), "shared pages"
        assert self._refs == [held[page] for page in range(len(self._refs))], "references"
        assert all(page in self._index for page in self._cached), "a cached page without a name"
        assert not any(page in self._index for page in self._blank), "a blank page with a name"


def _halves(page: int) -> tuple[int, ...]:
    """Of a page, whole or half."""
    return (2 * page, 2 * page + 1) if page > 0 else (~page,)
