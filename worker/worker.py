"""`Worker`: carries out plans."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sampling.accept import Drafts
from scheduler.plan import (
    NO_DRAFTING,
    Demotion,
    DraftTime,
    PageCopy,
    Row,
    RowResult,
    Shadow,
    StepPlan,
    StepResult,
)
from scheduler.request import SamplingParams, TokenLogprob
from worker.batch import Samples, StepBatch, build_batch, sink_batch
from worker.drafting import Drafting
from worker.executor import Executor, PendingStep
from worker.kv_pool import copy_halves, copy_pages
from worker.outcome import Outcome
from worker.ranks import Copies, Demotions, Followers, Nobody
from worker.runner import Runner
from worker.sampler import Form, Sampled, Sampler
from worker.slots import SlotTable
from worker.transfer import HostTransfer, Span, Transfer

# Prompt log-probabilities need a logits row per prompt token; this many at a time.
PROMPT_LOGPROB_ROWS = 256


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker says about itself."""

    vocab_size: int
    max_model_len: int
    num_pages: int  # the null page included
    page_size: int
    device: str
    dtype: str
    drafters: tuple[str, ...] = ()  # by name
    arithmetic: str = ""  # the runner's name, at the start
    # How many times as long verifying is expected to take while a draft model works ahead; 0: none
    # can.
    beside: float = 0.0


class BegunStep:
    """A step that was given to the device; see `worker.executor.Begun`."""

    def __init__(
        self,
        number: int,
        parts: Sequence[tuple[list[int], Outcome]],  # row indices, and what became of those rows
        drafting: DraftTime,
        shadows: tuple[Shadow, ...],
        rows: int,
        span: Span,
        read: Callable[[BegunStep], StepResult],
    ) -> None:
        self.number = number
        self.parts = parts
        self.drafting = drafting
        self.shadows = shadows
        self.rows = rows  # of the plan; those that are in no part were not run
        self.span = span
        self._read = read
        self._result: StepResult | None = None

    def wait(self) -> None:
        self.span.wait()

    def read(self) -> StepResult:
        """Read once, by whoever needs it first: the executor, or the drafters of a later step."""
        if self._result is None:
            self._result = self._read(self)
        return self._result


class Worker:
    """Holds the device state and turns each `StepPlan` into a `StepResult`.

    Everything below `launch` runs on the executor's thread: steps begin in the order of the plans,
    and are read in that order.
    """

    def __init__(
        self,
        runner: Runner,
        kv: Sequence[Tensor],
        slots: SlotTable,
        sampler: Sampler,
        executor: Executor,
        facts: WorkerFacts,
        host: Sequence[Tensor] = (),  # pages in host memory, laid out as in `kv`
        # None: rows verify what stands in the token table.
        drafting: Drafting | None = None,
        transfer: Transfer | None = None,  # None: host and device memory are the same
        followers: Followers | None = None,  # other ranks, which hold other parts of the pages
    ) -> None:
        self.facts = facts
        self._kv = kv
        self._host = host
        self._slots = slots
        self._sampler = sampler
        self._executor = executor
        self._drafting = drafting
        self._transfer = transfer or HostTransfer()
        self._unread: deque[BegunStep] = deque()  # oldest first
        self._closed = False
        self._followers = followers or Nobody()
        self._runner = runner  # for sequences admitted from now on
        self._runners: list[Runner] = [runner] * len(slots.epoch)  # by slot
        self._params: list[SamplingParams | None] = [None] * len(slots.epoch)
        self._prompt_len = [0] * len(slots.epoch)

    def launch(self, plan: StepPlan) -> PendingStep:
        """Starts a step, and does not wait for its end; see `ThreadExecutor`."""
        return self._executor.submit(lambda: self._begin(plan))

    @property
    def kv(self) -> Sequence[Tensor]:
        """The KV pool, for those who copy its pages; see `allocate_pool`."""
        return self._kv

    @property
    def lost(self) -> Future[str]:
        """Resolves, in a sentence, when steps cannot succeed any more; see `Followers`."""
        return self._followers.lost

    def use(self, runner: Runner) -> None:
        """Gives sequences admitted from now on another runner.

        Running ones keep theirs to their end, so that no stream changes arithmetic midway.
        """
        self.call(lambda: setattr(self, "_runner", runner))

    def draw_by(self, form: Form) -> None:
        """Draws by another form of the sampler from now on."""
        self.call(lambda: self._sampler.use(form))

    def call(self, function: Callable[[], None]) -> None:
        """Runs it on the worker's thread, after the steps launched so far have begun. A closed
        worker does nothing: kernels may become ready after the last request has ended."""
        if not self._closed:
            self._executor.call(function)

    def close(self) -> None:
        self._closed = True
        self._executor.close()
        if self._drafting is not None:
            self._drafting.close()
        self._followers.close()

    def _begin(self, plan: StepPlan) -> BegunStep:
        """Gives all work of a step to the device; the results of earlier steps may be outstanding.

        Nothing is read back here but what a drafter and a request for prompt log-probabilities
        need, so in plain decoding the device finds its next step waiting. Positions are taken from
        the device's own arrays; `SlotTable.bound` is an upper bound until drafts are settled.
        """
        if self._needs_results(plan):
            while self._unread:
                self._unread[0].wait()
                self._unread[0].read()
        span = self._transfer.begin()
        with torch.inference_mode():
            self._copy(plan.saves, to_host=True)
            self._demote(plan.demotions)
            for admit in plan.admits:
                self._copy(admit.loads, to_host=False)
                self._slots.admit(admit)
                self._sampler.slots.admit(admit.slot, admit.params, admit.choice, admit.prompt_len)
                self._runners[admit.slot] = self._runner
                self._params[admit.slot] = admit.params
                self._prompt_len[admit.slot] = admit.prompt_len
                if self._drafting is not None:
                    self._drafting.admit(admit)
            self._recall_sinks(plan)
            for row in plan.rows:
                self._slots.add_pages(row.slot, row.new_pages)
            rows: Sequence[Row] = plan.rows
            drafting = NO_DRAFTING
            shadows: tuple[Shadow, ...] = ()
            if self._drafting is not None:
                rows, drafting = self._drafting.draft(plan)
                shadows = self._drafting.take_shadows()
                self._drafting.look_ahead(rows)
            parts = [
                (indices, self._forward(runner, [rows[i] for i in indices]))
                for runner, indices in self._by_runner(rows)
            ]
            if self._drafting is not None:
                drafting = self._drafting.finished(drafting)
        span.end()
        step = BegunStep(plan.step, parts, drafting, shadows, len(rows), span, self._read)
        self._unread.append(step)
        return step

    def _needs_results(self, plan: StepPlan) -> bool:
        """Whether all steps before this one have to be read before it begins.

        Dense windows are covered, and given back, by exact lengths: so where there are any, steps
        do not overlap.
        """
        if self._slots.windows is not None:
            return True
        return self._drafting is not None and self._drafting.needs_results(plan)

    def _read(self, step: BegunStep) -> StepResult:
        """Reads a step that is done; the oldest that is unread."""
        assert self._unread.popleft() is step
        results: dict[int, RowResult] = {}
        for indices, outcome in step.parts:
            found = outcome.read(self._slots, self._drafting)
            results.update(zip(indices, found, strict=True))
            if self._slots.windows is not None:
                for row in outcome.rows:
                    self._slots.windows.settle(row.slot, self._slots.bound[row.slot])
        return StepResult(
            step=step.number,
            rows=tuple(results.get(i) or RowResult() for i in range(step.rows)),
            seconds=step.span.seconds() - step.drafting.seconds,
            drafting=step.drafting,
            shadows=step.shadows,
            over=step.rows - len(results),
        )

    def _recall_sinks(self, plan: StepPlan) -> None:
        """Computes the sinks of cached prefixes again: a prefix comes packed, and they are to be
        dense. They see nothing but each other, so they become what they were."""
        windows = self._slots.windows
        if windows is None or not windows.windows.sink:
            return
        sink = windows.windows.sink
        ends = [(a.slot, min(sink, len(a.cached))) for a in plan.admits if a.cached]
        if ends:
            ids, batch = sink_batch(self._slots, ends)
            self._runner.forward(ids, batch, self._kv)

    def _copy(self, pages: Sequence[PageCopy], *, to_host: bool) -> None:
        if not pages:
            return
        self._followers.tell(Copies(list(pages), to_host))
        pools = (self._kv, self._host) if to_host else (self._host, self._kv)
        copy_pages(*pools, pages)

    def _demote(self, demotions: Sequence[Demotion]) -> None:
        copies = [demotion.copy for demotion in demotions if demotion.copy is not None]
        if copies:
            self._followers.tell(Demotions(list(copies)))
            copy_halves(self._kv, copies)
        for demotion in demotions:
            self._slots.demote(demotion)

    def _by_runner(self, rows: Sequence[Row]) -> list[tuple[Runner, list[int]]]:
        """Indices of the rows to be run by runner; more than one only while a swap is under way."""
        groups: dict[int, tuple[Runner, list[int]]] = {}
        drafting = self._drafting
        for i, row in enumerate(rows):
            if drafting is not None and drafting.over(row):
                continue
            runner = self._runners[row.slot]
            groups.setdefault(id(runner), (runner, []))[1].append(i)
        return list(groups.values())

    def _forward(self, runner: Runner, rows: Sequence[Row]) -> Outcome:
        first = [self._slots.bound[row.slot] for row in rows]  # exact for rows with a chunk
        batch = build_batch(rows, self._slots, self._transfer)
        samples = batch.samples
        asked = [i for i, row in enumerate(rows) if self._wants_prompt_logprobs(row)]
        # Prompt log-probabilities read every position; otherwise only the sampled ones are.
        read = None if asked else samples.tokens
        self._executor.computes()
        hidden = runner.forward(batch.ids, batch.attention, self._kv, read)
        prompt_logprobs = {
            i: self._prompt_logprobs(runner, hidden, batch, i, first[i]) for i in asked
        }
        if not samples.rows:
            self._slots.computed[batch.row_slots] += batch.advance
            return Outcome(rows, prompt_logprobs)
        if asked and samples.tokens is not None:
            hidden = hidden[samples.tokens]
        logits = runner.logits(hidden)
        sampled = self._sampler.sample(
            logits, samples.host_slots, samples.positions, samples.slots, self._drafts(samples)
        )
        if self._drafting is not None:
            self._drafting.wait()
        self._commit(batch, sampled)
        fetched = sampled.fetched(self._transfer.fetch)
        return Outcome(rows, prompt_logprobs, samples.rows, samples.starts, fetched)

    def _drafts(self, samples: Samples) -> Drafts | None:
        """What a step judges. Row `j` of a sequence's logits rows judges draft `j`, which stands in
        the token table at that row's sampled position; the last row has no draft to judge."""
        if not samples.drafted:
            return None
        tokens = self._slots.tokens[samples.slots, samples.positions]
        return Drafts(tokens, samples.row_of, samples.first, samples.last)

    def _commit(self, batch: StepBatch, sampled: Sampled) -> None:
        """Advances the slots, by the longest match plus one; decode is the case of no drafts."""
        slots, samples = self._slots, batch.samples
        slots.tokens[samples.slots, samples.positions] = sampled.tokens.to(torch.int32)
        slots.computed[batch.row_slots] += batch.advance
        if sampled.accepted is not None:
            slots.computed[samples.row_slots] += sampled.accepted

    def _wants_prompt_logprobs(self, row: Row) -> bool:
        params = self._params[row.slot]
        return row.chunk is not None and params is not None and params.prompt_logprobs is not None

    def _prompt_logprobs(
        self, runner: Runner, hidden: Tensor, batch: StepBatch, i: int, first: int
    ) -> tuple[TokenLogprob, ...]:
        """About each prompt token that follows one of row `i`'s chunk, which starts at `first`."""
        row = batch.rows[i]
        params = self._params[row.slot]
        assert row.chunk is not None
        assert params is not None
        assert params.prompt_logprobs is not None
        following = row.chunk[1:] + (() if row.next_token is None else (row.next_token,))
        wanted = min(len(following), self._prompt_len[row.slot] - first - 1)
        start = sum(len(r.chunk) if r.chunk is not None else 1 + r.drafts for r in batch.rows[:i])
        found: list[TokenLogprob] = []
        for a in range(0, wanted, PROMPT_LOGPROB_ROWS):
            b = min(a + PROMPT_LOGPROB_ROWS, wanted)
            logits = runner.logits(hidden[start + a : start + b])
            found += self._sampler.prompt_logprobs(logits, following[a:b], params.prompt_logprobs)
        return tuple(found)
