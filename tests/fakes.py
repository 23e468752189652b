"""Stand-ins for the parts a test is not about."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from scheduler.plan import Admit, Demotion, PageCopy, Row, RowResult, StepPlan, StepResult
from scheduler.request import FinishReason, Request, SamplingParams, TokenLogprob

# --- ScriptedWorker: a worker without a model ---------------------------------------------------


class KVCorruptedError(AssertionError):
    """A sequence read a KV entry that does not belong to its own history."""


@dataclass(frozen=True, slots=True)
class Script:
    """The "model": each token follows from the seed, the choice and the whole history."""

    vocab_size: int = 50
    acceptance: float = 0.6  # share of drafts that are right

    def token(self, params: SamplingParams, choice: int, history: int) -> int:
        return hash((params.seed, choice, history)) % self.vocab_size

    def draft(self, params: SamplingParams, choice: int, history: int) -> int:
        right = self.token(params, choice, history)
        lucky = hash((history, params.seed, -1)) % 1000 < self.acceptance * 1000
        return right if lucky else (right + 1) % self.vocab_size

    def logprob(self, token: int, history: int) -> TokenLogprob:
        return TokenLogprob(token, -(hash((token, history)) % 1000) / 100, 1)

    def answer(self, request: Request, choice: int = 0) -> tuple[tuple[int, ...], FinishReason]:
        """What decoding this request alone must bring: the output tokens and how they end."""
        params = request.params
        history = history_of(request.prompt)
        output: list[int] = []
        while len(output) < params.max_tokens:
            token = self.token(params, choice, history)
            if token in params.stop_token_ids and len(output) >= params.min_tokens:
                return tuple(output), FinishReason.STOP
            output.append(token)
            history = extend(history, token)
        return tuple(output), FinishReason.LENGTH


def extend(history: int, token: int) -> int:
    """One number that names a token list: the name of the list before, and the new token."""
    return hash((history, token))


def history_of(tokens: Sequence[int]) -> int:
    history = 0
    for token in tokens:
        history = extend(history, token)
    return history


@dataclass(slots=True)
class _Slot:
    """What a real worker keeps in device arrays, and a name for every prefix."""

    admit: Admit
    tokens: list[int]
    names: list[int]  # names[i] is history_of(tokens[: i + 1])
    pages: list[int]

    def append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.names.append(extend(self.names[-1] if self.names else 0, token))
            self.tokens.append(token)

    def truncate(self, length: int) -> None:
        del self.tokens[length:], self.names[length:]


def _copy(source: list[list[int]], target: list[list[int]], copies: Sequence[PageCopy]) -> None:
    assert len({copy.target for copy in copies}) == len(copies), "a page is overwritten twice"
    for copy in copies:
        assert 0 not in copy, "page 0 is the null page"
        for half in range(2):
            target[2 * copy.target + half][:] = source[2 * copy.source + half]


@dataclass(slots=True)
class ScriptedStep:
    """A step in flight. `seconds` after its launch it is done."""

    result: StepResult
    ready_at: float
    error: Exception | None = None
    hang: threading.Event | None = None  # set when the worker is closed

    def done(self) -> bool:
        if self.hang is not None:
            return self.hang.is_set()
        return time.monotonic() >= self.ready_at

    def wait(self) -> StepResult:
        if self.hang is not None:
            self.hang.wait()
            raise RuntimeError("the worker was closed while a step hung")
        if not self.done():
            time.sleep(max(0.0, self.ready_at - time.monotonic()))
        if self.error is not None:
            raise self.error
        return self.result


@dataclass(slots=True)
class ScriptedWorker:
    """A `Worker` without torch: obeys plans and checks the content of every page it reads.

    Each KV entry holds the name of the whole token list up to its position, so a page handed out
    twice, reused too early, matched wrongly or overwritten by a rejected draft raises
    `KVCorruptedError`. Faults are injected by step number.

    A page is two halves, both of which hold its entries while it is whole: either is enough to read
    what was demoted.
    """

    num_pages: int
    page_size: int
    host_pages: int = 0
    script: Script = field(default_factory=Script)
    step_seconds: float = 0.0
    raise_at: dict[int, Exception] = field(default_factory=dict)
    hang_at: frozenset[int] = frozenset()
    # (step, row index, row) -> error message of a row that fails alone
    fail_row: Callable[[int, int, Row], str] = lambda step, index, row: ""

    plans: list[StepPlan] = field(default_factory=list)  # every plan, in the order of launch
    _kv: list[list[int]] = field(default_factory=list)
    _host: list[list[int]] = field(default_factory=list)
    _slots: dict[int, _Slot] = field(default_factory=dict)
    _closed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._kv = [[0] * self.page_size for _ in range(2 * self.num_pages)]
        self._host = [[0] * self.page_size for _ in range(2 * (1 + self.host_pages))]

    def launch(self, plan: StepPlan) -> ScriptedStep:
        """Carries the plan out at once; its result is read later."""
        self.plans.append(plan)
        return ScriptedStep(
            result=self.execute(plan),
            ready_at=time.monotonic() + self.step_seconds,
            error=self.raise_at.get(plan.step),
            hang=self._closed if plan.step in self.hang_at else None,
        )

    def close(self) -> None:
        self._closed.set()

    def execute(self, plan: StepPlan) -> StepResult:
        _copy(self._kv, self._host, plan.saves)
        for demotion in plan.demotions:
            self._demote(demotion)
        for admit in plan.admits:
            assert {copy.target for copy in admit.loads} <= set(admit.pages)
            _copy(self._host, self._kv, admit.loads)
            assert admit.slot > 0, "slot 0 is the null slot"
            assert len(admit.cached) == len(admit.pages) * self.page_size
            self._slots[admit.slot] = slot = _Slot(admit, [], [], list(admit.pages))
            slot.append(admit.cached)
        assert len({row.slot for row in plan.rows}) == len(plan.rows), "two rows for one slot"
        for row in plan.rows:
            slot = self._slots[row.slot]
            assert slot.admit.epoch == row.epoch, "a row for a former owner of the slot"
            assert 0 not in row.new_pages, "page 0 is the null page"
            slot.pages += row.new_pages
        rows = [self._run(plan.step, i, row) for i, row in enumerate(plan.rows)]
        return StepResult(plan.step, tuple(rows), self.step_seconds)

    def _demote(self, demotion: Demotion) -> None:
        slot, place = self._slots[demotion.slot], demotion.place
        assert slot.pages[place] == demotion.page > 0, "only whole pages are demoted"
        slot.pages[place] = demotion.half
        if demotion.copy is not None:
            self._kv[demotion.copy.target][:] = self._kv[demotion.copy.source]
            for half in range(2):
                self._kv[2 * demotion.page + half][:] = [0] * self.page_size

    def _run(self, step: int, index: int, row: Row) -> RowResult:
        slot = self._slots[row.slot]
        params, choice = slot.admit.params, slot.admit.choice
        if row.chunk is not None:
            start = len(slot.tokens)
            self._read(slot, start)
            slot.append(row.chunk)
            self._write(slot, start)
            prompt_logprobs = self._prompt_logprobs(slot, row, start)
            drafted: list[int] = []
        else:
            start = len(slot.tokens)
            self._read(slot, start - 1)
            prompt_logprobs = ()
            drafted = []
            for _ in range(row.drafts):
                drafted.append(self.script.draft(params, choice, slot.names[-1]))
                slot.append(drafted[-1:])
            self._write(slot, start - 1)
        if not row.samples:
            return RowResult(prompt_logprobs=prompt_logprobs)
        base = len(slot.tokens) - len(drafted)
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        for i in range(len(drafted) + 1):
            history = slot.names[base + i - 1]
            tokens.append(self.script.token(params, choice, history))
            logprobs.append(self.script.logprob(tokens[-1], history))
            if i < len(drafted) and tokens[-1] != drafted[i]:
                break
        slot.truncate(base)
        slot.append(tokens)
        error = self.fail_row(step, index, row)
        if error:
            return RowResult(error=error)
        return RowResult(
            tokens=tuple(tokens),
            logprobs=() if params.logprobs is None else tuple(logprobs),
            prompt_logprobs=prompt_logprobs,
            proposed=len(drafted),
        )

    def _prompt_logprobs(self, slot: _Slot, row: Row, start: int) -> tuple[TokenLogprob, ...]:
        assert row.chunk is not None
        if slot.admit.params.prompt_logprobs is None:
            return ()
        known = [*slot.tokens, *(() if row.next_token is None else (row.next_token,))]
        end = min(len(known), slot.admit.prompt_len)
        return tuple(
            self.script.logprob(known[i], slot.names[i - 1]) for i in range(start + 1, end)
        )

    def _write(self, slot: _Slot, start: int) -> None:
        for i in range(start, len(slot.tokens)):
            page = slot.pages[i // self.page_size]
            assert page > 0, "half of a page is written to"
            for half in range(2):
                self._kv[2 * page + half][i % self.page_size] = slot.names[i]

    def _read(self, slot: _Slot, length: int) -> None:
        size = self.page_size
        for first in range(0, length, size):
            expected = slot.names[first : min(first + size, length)]
            page = slot.pages[first // size]
            halves = (~page,) if page < 0 else (2 * page, 2 * page + 1)
            if any(self._kv[half][: len(expected)] != expected for half in halves):
                raise KVCorruptedError(f"slot {slot.admit.slot}, positions from {first}")
