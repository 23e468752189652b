"""`Counts`: what a scheduler has done since its start."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.admission import Admission
from scheduler.memory import Memory
from scheduler.plan import DraftTime
from scheduler.request import Load
from scheduler.sequence import Sequence
from scheduler.wait import Waits
from scheduler.waiting import WaitingQueue


@dataclass(slots=True)
class Counts:
    """The counters of `Load`, which says what they mean."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    rows_stalled: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    pages_demoted: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_position: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    ahead_seconds: float = 0.0
    ahead_rows: int = 0
    foreseen_rows: int = 0

    def drafting(self, work: DraftTime) -> None:
        """What drafting took of a step."""
        self.draft_seconds += work.seconds
        self.ahead_seconds += work.beside
        self.ahead_rows += work.ahead
        self.foreseen_rows += work.foreseen

    def drafted(self, proposed: int, accepted: int) -> None:
        """A row verified drafts."""
        self.drafts += 1
        self.draft_tokens += proposed
        self.accepted_tokens += accepted
        counts = self.accepted_by_position
        counts += [0] * (accepted - len(counts))
        for position in range(accepted):
            counts[position] += 1

    def admitted(self, sequence: Sequence, cached: int, *, again: bool) -> None:
        """A sequence got a slot with `cached` positions from the prefix cache.

        A prompt counts once per request, and a look-up by a victim of preemption not at all, nor
        by what goes on after a restart.
        """
        if again:
            self.recomputed_tokens += len(sequence.tokens) - cached
            return
        if sequence.choice == 0:
            self.prompt_tokens += sequence.prompt_len
        if sequence.prompt_logprobs is None:  # else it bypassed the cache
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += cached

    def load(
        self,
        running: int,
        waiting: WaitingQueue,
        memory: Memory,
        admission: Admission,
        predicted_wait: float,
        waits: Waits,
    ) -> Load:
        pool, host = memory.pool, memory.host
        return Load(
            running=running,
            waiting=len(waiting),
            waiting_tokens=waiting.tokens,
            predicted_wait=predicted_wait,
            pages_total=pool.total,
            pages_held=pool.total - pool.available,
            pages_cached=pool.cached,
            pages_forecast=admission.peak,
            pages_reserved=admission.reserved,
            host_pages_total=host.total if host else 0,
            host_pages_held=host.held if host else 0,
            steps=self.steps,
            step_seconds=waits.seconds,
            step_seconds_profiled=waits.uncorrected,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            rows_stalled=self.rows_stalled,
            preemptions=self.preemptions,
            recomputed_tokens=self.recomputed_tokens,
            pages_swapped_out=host.swapped_out if host else 0,
            pages_swapped_in=host.swapped_in if host else 0,
            pages_demoted=self.pages_demoted,
            drafts=self.drafts,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
            accepted_by_position=tuple(self.accepted_by_position),
            draft_seconds=self.draft_seconds,
            ahead_seconds=self.ahead_seconds,
            ahead_rows=self.ahead_rows,
            foreseen_rows=self.foreseen_rows,
        )
