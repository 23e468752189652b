"""`Memory`: the slots and pages sequences hold, and what they share through the prefix index."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import NamedTuple

from scheduler.host_tier import HostTier
from scheduler.pages import NULL_PAGE, PagePool
from scheduler.plan import Demotion, PageCopy
from scheduler.prefix import PrefixIndex
from scheduler.request import SchedulerConfig
from scheduler.sequence import Sequence


class Hits(NamedTuple):
    """A cached prefix."""

    pages: list[int]  # in order; the null page where it must be loaded from the host
    loads: list[int]  # the host pages of those, in order

    @property
    def on_device(self) -> list[int]:
        return [page for page in self.pages if page] if self.loads else self.pages

    def cut(self, pages: int) -> None:
        """Does without those behind the first `pages`."""
        dropped = self.pages[pages:].count(NULL_PAGE)
        del self.pages[pages:]
        del self.loads[len(self.loads) - dropped :]


class Memory:
    """Slots and pages of one worker.

    What is released while a step is in flight is fenced until that step has settled: the step may
    still write there, and so may copies that were started with it.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._index = PrefixIndex()
        self.host = HostTier(config.host_pages) if config.host_pages else None
        evicted = self.host.evicted if self.host is not None else None
        self.pool = PagePool(config.num_pages, self._index, evicted)
        # Positions one sequence may ever use: alone in the pool it must be able to finish.
        self.max_len = min(config.max_model_len, self.pool.total * config.page_size)
        self._slots = deque(range(1, config.max_num_seqs + 1))
        self._fenced_slots: dict[int, list[int]] = {}  # by the step that must settle
        self._next_epoch = 1

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    def hits(self, sequence: Sequence) -> Hits:
        """The longest cached prefix; the last token is always computed, for its logits.

        Prompt log-probabilities need the logits of every position, so they bypass the cache.
        """
        if sequence.prompt_logprobs is not None:
            return Hits([], [])
        if not self._config.enable_prefix_cache and not (self.host and sequence.preemptions):
            return Hits([], [])
        count = (len(sequence.tokens) - 1) // self._config.page_size
        block = max(self._config.prefix_block // self._config.page_size, 1)
        count -= count % block
        found = Hits(self._index.match(sequence.chain, sequence.tokens, count), [])
        if self.host is not None:
            self._load_more(found, sequence, count)
        found.cut(len(found.pages) - len(found.pages) % block)
        return found

    def _load_more(self, found: Hits, sequence: Sequence, count: int) -> None:
        """Goes on where the device has lost a page but the host has it."""
        assert self.host is not None
        pages, loads = found.pages, found.loads
        for i in range(len(pages), count):
            link = sequence.chain.link(i, sequence.tokens)
            page = self._index.find(link)
            if page is None:
                source = self.host.find(link)
                if source is None:
                    break
                page = NULL_PAGE
                loads.append(source)
            pages.append(page)

    def pin(self, hits: Hits) -> None:
        """Keeps hits where they are until `seat`."""
        self.pool.pin(hits.on_device)
        if self.host is not None and hits.loads:
            self.host.pin(hits.loads)

    def seat(self, sequence: Sequence, hits: Hits, step: int) -> tuple[PageCopy, ...]:
        """Gives a sequence a slot and its pinned hits; returns what `step` loads for it.

        Whoever hits a loaded page from the next plan on reads it after `step` has written it.
        """
        pages, loads = hits.pages, tuple[PageCopy, ...]()
        if self.host is not None:
            self.host.release(sequence, fence=step)
            if hits.loads:
                pages, loads = self._loaded(sequence, hits)
                self.host.loaded(hits.loads, step)
        cached = len(pages) * self._config.page_size
        sequence.enter(self._slots.popleft(), self._next_epoch, pages, cached)
        self._next_epoch += 1
        return loads

    def _loaded(self, sequence: Sequence, hits: Hits) -> tuple[list[int], tuple[PageCopy, ...]]:
        """Fresh pages, under their names, where hits must be loaded."""
        pages = list(hits.pages)
        missing = [i for i, page in enumerate(pages) if page == NULL_PAGE]
        for i, page in zip(missing, self.pool.take(len(missing)), strict=True):
            pages[i] = page
            self._index.register(page, sequence.chain.link(i, sequence.tokens))
        loads = zip(hits.loads, (pages[i] for i in missing), strict=True)
        return pages, tuple(PageCopy(source, target) for source, target in loads)

    def publish(self, sequence: Sequence) -> None:
        """Puts the pages that settled results have filled into the prefix index.

        A rejected draft never stands in one of them: it lies beyond `computed`.
        """
        size = self._config.page_size
        while sequence.computed - sequence.registered >= size:
            if self._config.enable_prefix_cache and not sequence.halves:
                page = sequence.registered // size
                link = sequence.chain.link(page, sequence.tokens)
                self._index.register(sequence.pages[page], link)
            sequence.registered += size

    def demote(self, sequence: Sequence, place: int) -> Demotion:
        """Has a page of a sequence read by half of its bits from now on, which is all that is left
        of it. Pages behind it lose their names, for nobody can come to them by a prefix."""
        page = sequence.pages[place]
        for other in sequence.pages[place:]:
            if other > 0:
                self.pool.forget(other)
        half = self.pool.demote(page)
        sequence.demote(place, half, self._config.page_size)
        return Demotion(sequence.slot, place, page, half)

    def keep(self, sequence: Sequence) -> None:
        """Has the settled pages of a sequence that is about to be paused saved when evicted."""
        if self.host is None or sequence.prompt_logprobs is not None or sequence.halves:
            return
        chain, tokens = sequence.chain, sequence.tokens
        count = sequence.registered // self._config.page_size
        links = [chain.link(i, tokens) for i in range(count)]
        if not self._config.enable_prefix_cache:  # the names are its own, for the time it waits
            for page, link in zip(sequence.pages, links, strict=False):
                self._index.register(page, link)
        self.host.keep(sequence, links)

    def forgo(self, sequence: Sequence, fence: int | None) -> None:
        """A paused sequence ended: nothing is kept for it any more."""
        if self.host is not None:
            self.host.release(sequence, fence)

    def saves(self) -> tuple[PageCopy, ...]:
        """What the plan being made must save before its rows write."""
        return () if self.host is None else self.host.take_saves()

    def release(self, sequence: Sequence, fence: int | None) -> None:
        """Takes slot and pages away; `fence` is the newest step in flight."""
        self.pool.drop(sequence.pages, fence)
        if fence is None:
            self._slots.append(sequence.slot)
        else:
            self._fenced_slots.setdefault(fence, []).append(sequence.slot)
        sequence.leave()

    def lift(self, step: int) -> bool:
        """Frees what was fenced by a step that has settled. True if there was anything."""
        if self.host is not None:
            self.host.lift(step)
        slots = self._fenced_slots.pop(step, ())
        self._slots.extend(slots)
        return self.pool.lift(step) or bool(slots)

    def check(
        self, running: Iterable[Sequence], waiting: Iterable[Sequence], in_flight: Iterable[int]
    ) -> None:
        """Raises `AssertionError` unless every page and slot is in exactly one place."""
        running = list(running)
        if self.host is not None:
            self.host.check(list(waiting))
        self.pool.check(Counter(page for sequence in running for page in sequence.pages))
        fenced = [slot for slots in self._fenced_slots.values() for slot in slots]
        slots = [*self._slots, *fenced, *(sequence.slot for sequence in running)]
        assert sorted(slots) == list(range(1, self._config.max_num_seqs + 1)), "slots"
        assert set(self._fenced_slots) <= set(in_flight), "a fence without a step"
