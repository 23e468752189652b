"""`Memory`: the slots and pages sequences hold, and what they share through the prefix index."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from scheduler.pages import PagePool
from scheduler.prefix import PrefixIndex
from scheduler.request import SchedulerConfig
from scheduler.sequence import Sequence


class Memory:
    """Slots and pages of one worker.

    What is released while a step is in flight is fenced until that step has settled: the step may
    still write there, and so may copies that were started with it.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._index = PrefixIndex()
        self.pool = PagePool(config.num_pages, self._index)
        # Positions one sequence may ever use: alone in the pool it must be able to finish.
        self.max_len = min(config.max_model_len, self.pool.total * config.page_size)
        self._slots = deque(range(1, config.max_num_seqs + 1))
        self._fenced_slots: dict[int, list[int]] = {}  # by the step that must settle
        self._next_epoch = 1

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    def hits(self, sequence: Sequence) -> list[int]:
        """Pages of the longest cached prefix; the last token is always computed, for its logits.

        Prompt log-probabilities need the logits of every position, so they bypass the cache.
        """
        if not self._config.enable_prefix_cache or sequence.prompt_logprobs is not None:
            return []
        pages = (len(sequence.tokens) - 1) // self._config.page_size
        return self._index.match(sequence.chain, sequence.tokens, pages)

    def seat(self, sequence: Sequence, hits: list[int]) -> None:
        """Gives a sequence a slot and its prefix hits, which the caller has pinned."""
        cached = len(hits) * self._config.page_size
        sequence.enter(self._slots.popleft(), self._next_epoch, hits, cached)
        self._next_epoch += 1

    def publish(self, sequence: Sequence) -> None:
        """Puts the pages that settled results have filled into the prefix index.

        A rejected draft never stands in one of them: it lies beyond `computed`.
        """
        size = self._config.page_size
        while sequence.computed - sequence.registered >= size:
            if self._config.enable_prefix_cache:
                page = sequence.registered // size
                link = sequence.chain.link(page, sequence.tokens)
                self._index.register(sequence.pages[page], link)
            sequence.registered += size

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
        slots = self._fenced_slots.pop(step, ())
        self._slots.extend(slots)
        return self.pool.lift(step) or bool(slots)

    def check(self, running: Iterable[Sequence], in_flight: Iterable[int]) -> None:
        """Raises `AssertionError` unless every page and slot is in exactly one place."""
        running = list(running)
        self.pool.check(Counter(page for sequence in running for page in sequence.pages))
        fenced = [slot for slots in self._fenced_slots.values() for slot in slots]
        slots = [*self._slots, *fenced, *(sequence.slot for sequence in running)]
        assert sorted(slots) == list(range(1, self._config.max_num_seqs + 1)), "slots"
        assert set(self._fenced_slots) <= set(in_flight), "a fence without a step"
