"""`Worker`: carries out plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.sampling.accept import accepted_counts
from scheduler.plan import NO_DRAFTING, Row, RowResult, StepPlan, StepResult
from scheduler.request import SamplingParams, TokenLogprob
from worker.batch import StepBatch, build_batch, sink_batch
from worker.drafting import Drafting
from worker.executor import PendingStep, ThreadExecutor
from worker.kv_pool import copy_pages
from worker.runner import Runner
from worker.sampler import Form, Sampled, Sampler
from worker.slots import SlotTable

NOT_FINITE = "the model produced logits that are not finite"
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
    # How many times as long verifying is expected to take while a draft model works ahead; 0: none
    # can.
    beside: float = 0.0


class Worker:
    """Holds the device state and turns each `StepPlan` into a `StepResult`.

    Everything below `launch` runs on the executor's thread, in the order of the plans.
    """

    def __init__(
        self,
        runner: Runner,
        kv: Sequence[Tensor],
        slots: SlotTable,
        sampler: Sampler,
        executor: ThreadExecutor,
        facts: WorkerFacts,
        host: Sequence[Tensor] = (),  # pages in host memory, laid out as in `kv`
        # None: rows verify what stands in the token table.
        drafting: Drafting | None = None,
    ) -> None:
        self.facts = facts
        self._kv = kv
        self._host = host
        self._slots = slots
        self._sampler = sampler
        self._executor = executor
        self._drafting = drafting
        self._runner = runner  # for sequences admitted from now on
        self._runners: list[Runner] = [runner] * len(slots.epoch)  # by slot
        self._params: list[SamplingParams | None] = [None] * len(slots.epoch)
        self._prompt_len = [0] * len(slots.epoch)

    def launch(self, plan: StepPlan) -> PendingStep:
        """Starts a step and returns at once."""
        return self._executor.submit(lambda: self._execute(plan))

    @property
    def kv(self) -> Sequence[Tensor]:
        """The KV pool, for those who copy its pages; see `allocate_pool`."""
        return self._kv

    def use(self, runner: Runner) -> None:
        """Gives sequences admitted from now on another runner.

        Running ones keep theirs to their end, so that no stream changes arithmetic midway.
        """
        self.call(lambda: setattr(self, "_runner", runner))

    def draw_by(self, form: Form) -> None:
        """Draws by another form of the sampler from now on."""
        self.call(lambda: self._sampler.use(form))

    def call(self, function: Callable[[], None]) -> None:
        """Runs it on the worker's thread, after the steps launched so far."""
        self._executor.call(function)

    def close(self) -> None:
        self._executor.close()
        if self._drafting is not None:
            self._drafting.close()

    def _execute(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        with torch.inference_mode():
            copy_pages(self._kv, self._host, plan.saves)
            for admit in plan.admits:
                copy_pages(self._host, self._kv, admit.loads)
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
            if self._drafting is not None:
                rows, drafting = self._drafting.draft(plan)
                self._drafting.look_ahead(rows)
            results: dict[int, RowResult] = {}
            for runner, indices in self._by_runner(rows):
                some = [rows[i] for i in indices]
                results.update(zip(indices, self._forward(runner, some), strict=True))
            if self._slots.windows is not None:
                for row in rows:
                    self._slots.windows.settle(row.slot, self._slots.bound[row.slot])
            if not any(row.samples for row in rows):
                self._finish()  # nothing was read back, so nothing was waited for
            if self._drafting is not None:
                drafting = self._drafting.finished(drafting)
        return StepResult(
            step=plan.step,
            rows=tuple(results[i] for i in range(len(rows))),
            seconds=time.perf_counter() - started - drafting.seconds,
            drafting=drafting,
            shadows=() if self._drafting is None else self._drafting.take_shadows(),
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

    def _finish(self) -> None:
        """Waits for the device, so that a step's seconds are its own and not its successor's."""
        if self._slots.tokens.is_cuda:
            torch.cuda.synchronize(self._slots.tokens.device)

    def _by_runner(self, rows: Sequence[Row]) -> list[tuple[Runner, list[int]]]:
        """Row indices by runner; more than one only while a swap is under way."""
        groups: dict[int, tuple[Runner, list[int]]] = {}
        for i, row in enumerate(rows):
            runner = self._runners[row.slot]
            groups.setdefault(id(runner), (runner, []))[1].append(i)
        return list(groups.values())

    def _forward(self, runner: Runner, rows: Sequence[Row]) -> list[RowResult]:
        first = [self._slots.bound[row.slot] for row in rows]  # exact for rows with a chunk
        batch = build_batch(rows, self._slots)
        asked = [i for i, row in enumerate(rows) if self._wants_prompt_logprobs(row)]
        # Prompt log-probabilities read every position; otherwise only the sampled ones are.
        read = None if asked else batch.sample_tokens
        hidden = runner.forward(batch.ids, batch.attention, self._kv, read)
        prompt_logprobs = {
            i: self._prompt_logprobs(runner, hidden, batch, i, first[i]) for i in asked
        }
        if not batch.sample_slots:
            self._slots.computed[batch.row_slots] += batch.advance
            return [RowResult(prompt_logprobs=prompt_logprobs.get(i, ())) for i in range(len(rows))]
        if asked and batch.sample_tokens is not None:
            hidden = hidden[batch.sample_tokens]
        logits = runner.logits(hidden)
        sampled = self._sampler.sample(logits, batch.sample_slots, batch.sample_positions)
        if self._drafting is not None:
            self._drafting.wait()
        return self._commit(batch, sampled, prompt_logprobs)

    def _commit(
        self,
        batch: StepBatch,
        sampled: Sampled,
        prompt_logprobs: dict[int, tuple[TokenLogprob, ...]],
    ) -> list[RowResult]:
        """Verifies drafts, advances the slots and reads the outcome back.

        Row `j` of a sequence's logits rows judges draft `j`, which stands in the token table at
        that row's sampled position; the last row has no draft to judge. The commit is the longest
        match plus one; decode is the case of no drafts.
        """
        slots, rows = self._slots, batch.rows
        sampling = [i for i, row in enumerate(rows) if row.samples]
        slot_of_sample = torch.tensor(batch.sample_slots, device=sampled.tokens.device)
        accepted = None
        if len(batch.sample_slots) > len(sampling):
            drafts = slots.tokens[slot_of_sample, batch.sample_positions].long()
            accepted = accepted_counts(sampled.tokens, drafts, batch.sample_starts)
        slots.tokens[slot_of_sample, batch.sample_positions] = sampled.tokens.to(torch.int32)
        slots.computed[batch.row_slots] += batch.advance
        if accepted is not None:
            at = torch.tensor(sampling, device=accepted.device)
            slots.computed[batch.row_slots[at]] += accepted

        tokens, finite = sampled.tokens.tolist(), sampled.finite.tolist()
        kept = [0] * len(sampling) if accepted is None else accepted.tolist()
        results = [RowResult(prompt_logprobs=prompt_logprobs.get(i, ())) for i in range(len(rows))]
        spans = pairwise(batch.sample_starts)
        for i, (start, end), matched in zip(sampling, spans, kept, strict=True):
            row, committed = rows[i], slice(start, start + matched + 1)
            slots.bound[row.slot] -= row.drafts - matched
            if not all(finite[committed]):
                results[i] = RowResult(error=NOT_FINITE)
                continue
            results[i] = result = RowResult(
                tokens=tuple(tokens[committed]),
                logprobs=sampled.logprobs_of(committed),
                prompt_logprobs=prompt_logprobs.get(i, ()),
                proposed=end - start - 1,
            )
            if self._drafting is not None:
                drafted = self._drafting.committed(row.slot, tokens[start:end], matched)
                if drafted is not None:
                    result.drafter = drafted.drafter
                    result.confidence = tuple(drafted.guess.confidence)
        return results

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
