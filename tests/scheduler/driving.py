"""Runs a scheduler against a scripted worker and judges what came out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from scheduler.admission import Policy, make_policy
from scheduler.plan import StepPlan
from scheduler.request import (
    Finish,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    SchedulerConfig,
    TokenLogprob,
)
from scheduler.scheduler import Scheduler
from scheduler.speculation import FixedDrafts
from tests.fakes import Script, ScriptedStep, ScriptedWorker, extend, history_of

EOS = 7
NATURAL = (FinishReason.STOP, FinishReason.LENGTH)


def request(
    name: str,
    prompt: Iterable[int],
    max_tokens: int = 8,
    *,
    seed: int = 0,
    arrival: float = 0.0,
    stop: Iterable[int] = (),
    min_tokens: int = 0,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    **fields,
) -> Request:
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        seed=seed,
        stop_token_ids=frozenset(stop),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    return Request(name, tuple(prompt), params, arrival, **fields)


def greedy() -> Policy:
    """Admission that leaves no page to grow into: preemption all the time."""
    return make_policy("aggressive", watermark=0.0)


@dataclass
class Pair:
    """A scheduler and its worker, driven step by step on a clock that counts steps."""

    scheduler: Scheduler
    worker: ScriptedWorker
    depth: int = 1
    now: float = 0.0
    outputs: list[Output] = field(default_factory=list)
    in_flight: deque[tuple[StepPlan, ScriptedStep]] = field(default_factory=deque)

    def add(self, *requests: Request) -> None:
        for item in requests:
            self.scheduler.add(item, self.now)

    def step(self) -> StepPlan | None:
        """One turn of the engine's loop: plan, launch, settle what is `depth` steps behind."""
        self.now += 1
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self.in_flight.append((plan, self.worker.launch(plan)))
        while self.in_flight and (len(self.in_flight) > self.depth or plan is None):
            self.settle()
        self.outputs += self.scheduler.take_outputs()
        self.scheduler.check()
        return plan

    def settle(self) -> None:
        plan, step = self.in_flight.popleft()
        self.outputs += self.scheduler.settle(plan, step.wait(), self.now)
        self.scheduler.check()

    def abort(self, name: str, **how) -> None:
        self.outputs += self.scheduler.abort(name, self.now, **how)
        self.scheduler.check()

    def finish(self) -> dict[tuple[str, int], Answer]:
        """Runs to the end; nothing may be left behind."""
        idle = 0
        while self.scheduler.has_work():
            idle = 0 if self.step() is not None else idle + 1
            assert idle < 10, "stuck"
        load = self.scheduler.load()
        assert load.running == load.waiting == load.waiting_tokens == load.pages_held == 0
        assert load.host_pages_held == 0
        return gather(self.outputs)


def pair(
    *,
    num_pages: int = 100,
    page_size: int = 4,
    slots: int = 8,
    budget: int = 64,
    max_len: int = 200,
    depth: int = 1,
    drafts: int = 0,
    policy: Policy | None = None,
    script: Script | None = None,
    **config,
) -> Pair:
    scheduler = Scheduler(
        SchedulerConfig(
            num_pages=num_pages,
            page_size=page_size,
            max_num_seqs=slots,
            max_step_tokens=budget,
            max_model_len=max_len,
            **config,
        ),
        drafts=FixedDrafts(drafts),
        policy=policy,
    )
    worker = ScriptedWorker(num_pages, page_size, scheduler.config.host_pages, script or Script())
    return Pair(scheduler, worker, depth)


@dataclass
class Answer:
    """Everything one choice brought."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: Finish | None = None


def gather(outputs: Iterable[Output]) -> dict[tuple[str, int], Answer]:
    """Joins the outputs of each choice; each ends once, and nothing follows an end."""
    answers: dict[tuple[str, int], Answer] = {}
    for output in outputs:
        answer = answers.setdefault((output.request_id, output.choice), Answer())
        assert answer.finish is None, "output after the end"
        if output.prompt_logprobs is not None:
            assert not answer.tokens, "prompt log-probabilities come with the first output"
            answer.prompt_logprobs = output.prompt_logprobs
        answer.tokens += output.tokens
        answer.logprobs += output.logprobs
        answer.finish = output.finish
    return answers


def produced(item: Request, choice: int) -> tuple[int, ...]:
    """What a choice had committed before a restart."""
    return (item.produced[choice] or ()) if item.produced else ()


def assert_exact(
    answers: dict[tuple[str, int], Answer], requests: Iterable[Request], script: Script
) -> None:
    """Every choice that ended by itself is exactly what decoding it alone gives; of one that was
    ended from outside, all that came is."""
    for item in requests:
        for choice in item.open_choices:
            answer = answers[item.id, choice]
            finish = answer.finish
            assert finish is not None
            expected, reason = script.answer(item, choice)
            before = produced(item, choice)
            already = len(before)
            whole = [*before, *answer.tokens]
            if finish.reason in NATURAL:
                assert (tuple(whole), finish.reason) == (expected, reason)
                stopped = reason is FinishReason.STOP
                assert (finish.stop_token is not None) == stopped
                assert finish.completion_tokens == len(expected) + stopped
            else:
                assert tuple(whole) == expected[: len(whole)]
            assert finish.prompt_tokens == len(item.prompt)
            _assert_logprobs(answer, item, choice, already, script)


def _assert_logprobs(
    answer: Answer, item: Request, choice: int, already: int, script: Script
) -> None:
    history = history_of(item.prompt)
    for token in produced(item, choice):
        history = extend(history, token)
    if item.params.logprobs is None:
        assert not answer.logprobs
    else:
        assert len(answer.logprobs) == len(answer.tokens)
        for token, logprob in zip(answer.tokens, answer.logprobs, strict=True):
            assert logprob == script.logprob(token, history)
            history = extend(history, token)
    asked = item.params.prompt_logprobs is not None and choice == 0 and not already
    if not (asked and answer.tokens):
        assert answer.prompt_logprobs is None or asked
        return
    assert answer.prompt_logprobs is not None
    history = 0
    for i, logprob in enumerate(answer.prompt_logprobs):
        assert logprob == (script.logprob(item.prompt[i], history) if i else None)
        history = extend(history, item.prompt[i])
    assert len(answer.prompt_logprobs) == len(item.prompt)
