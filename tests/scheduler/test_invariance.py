"""The scheduler must never show in the text: whatever it does, the output is that of one request
decoded alone. The worker checks the content of every page it reads."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler.admission import make_policy
from scheduler.memory import Memory
from scheduler.pages import PagePool
from scheduler.request import FinishReason, Request
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence
from tests.fakes import KVCorruptedError, Script
from tests.scheduler.driving import EOS, Pair, assert_exact, gather, greedy, pair, request

POLICIES = [greedy, make_policy, partial(make_policy, "conservative")]
PAGES = {1: (170, 900), 4: (46, 260), 16: (11, 80)}  # by page size: tight, ample


def workload(count: int, seed: int) -> list[Request]:
    """Requests of mixed lengths; many share prefixes."""
    rng = random.Random(seed)
    shared = [tuple(rng.randrange(50) for _ in range(40)) for _ in range(3)]
    requests = []
    for i in range(count):
        prefix = rng.choice(shared)[: rng.randrange(8, 40)]
        tail = tuple(rng.randrange(50) for _ in range(rng.randrange(1, 20)))
        requests.append(
            request(f"r{i}", prefix + tail, rng.randrange(1, 60), seed=i, arrival=i, stop=[EOS])
        )
    return requests


def run(pair: Pair, requests: list[Request], per_step: int = 3) -> None:
    """Adds a few requests each step, then runs to the end."""
    todo = list(requests)
    while todo:
        pair.add(*todo[:per_step])
        del todo[:per_step]
        pair.step()
    pair.finish()


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_output_is_that_of_plain_decoding(page_size: int, depth: int) -> None:
    requests = workload(24, seed=page_size)
    preemptions = hits = 0
    for budget, drafts, ample, acceptance in itertools.product(
        (16, 64), (0, 1, 4), (0, 1), (0.3, 0.9)
    ):
        if drafts == 0 and acceptance == 0.9:
            continue
        both = pair(
            num_pages=PAGES[page_size][ample],
            page_size=page_size,
            budget=budget,
            drafts=drafts,
            depth=depth,
            policy=None if ample else greedy(),
            script=Script(acceptance=acceptance),
        )
        run(both, requests)
        assert_exact(gather(both.outputs), requests, both.worker.script)
        preemptions += both.scheduler.load().preemptions
        hits += both.scheduler.load().prefix_hits
    assert preemptions > 50, "the tight configurations must be tight"
    assert hits > 1000


@st.composite
def anything(draw: st.DrawFn) -> tuple[Pair, list[Request], random.Random]:
    """A scheduler of any shape, and requests that use everything a request can ask for."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    page_size = draw(st.sampled_from([1, 2, 3, 5, 8, 16]))
    max_len = draw(st.integers(30, 120))
    # Sometimes the pool can't even hold one sequence of the full length.
    num_pages = 1 + -(-max_len // page_size) * draw(st.sampled_from([1, 2, 3, 8])) * 3 // 4
    slots = draw(st.integers(1, 9))
    both = pair(
        num_pages=max(num_pages, 1 + -(-41 // page_size)),
        page_size=page_size,
        slots=slots,
        budget=draw(st.integers(slots, 80)),
        max_len=max(max_len, 41),
        depth=draw(st.integers(0, 3)),
        drafts=draw(st.integers(0, 5)),
        policy=draw(st.sampled_from(POLICIES))(),
        script=Script(vocab_size=20, acceptance=draw(st.sampled_from([0.0, 0.5, 1.0]))),
        enable_prefix_cache=draw(st.booleans()),
        host_pages=draw(st.sampled_from([0, 0, 1, 5, 100])),
        demote_all_but=draw(st.sampled_from([None, None, 0, 8])),
        lookahead=draw(st.integers(0, 3)),
        long_prefill_rows=draw(st.integers(2, 4)),
    )
    shared = [rng.randrange(20) for _ in range(40)]
    limit = min(max(max_len, 41), (max(num_pages, 1 + -(-41 // page_size)) - 1) * page_size)
    requests = []
    for i in range(draw(st.integers(1, 14))):
        prompt = shared[: rng.randrange(30)] + [rng.randrange(20) for _ in range(rng.randint(1, 9))]
        # Beyond this the context would end it, which `Script.answer` does not know.
        max_tokens = rng.randint(1, min(30, limit - len(prompt)))
        requests.append(
            request(
                f"r{i}",
                prompt,
                max_tokens,
                seed=rng.randrange(4),
                arrival=float(i),
                stop=[7] if rng.random() < 0.5 else [],
                min_tokens=rng.randint(0, min(3, max_tokens)),
                logprobs=rng.choice([None, 2]),
                prompt_logprobs=rng.choice([None, None, 1]),
                n=rng.choice([1, 1, 1, 3]),
                priority=rng.choice([0, 0, -1, 2]),
                tenant=rng.choice(["", "a"]),
                cache_salt=rng.choice([b"", b"s"]),
                deadline=rng.choice([None, None, None, rng.uniform(2, 40)]),
                queue_deadline=rng.choice([None, None, None, rng.uniform(2, 20)]),
            )
        )
    return both, requests, rng


RANDOM = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@RANDOM
@given(anything())
def test_output_is_exact_for_anything_a_request_can_ask(case) -> None:
    both, requests, rng = case
    run(both, requests, per_step=rng.randint(1, 4))
    assert_exact(gather(both.outputs), requests, both.worker.script)


@RANDOM
@given(anything())
def test_aborts_and_failed_rows_leave_the_others_exact(case) -> None:
    both, requests, rng = case
    both.worker.fail_row = lambda step, index, row: "failed" if rng.random() < 0.01 else ""
    todo = list(requests)
    while todo or both.scheduler.has_work():
        for item in todo[:2]:
            both.add(item)
        del todo[:2]
        if rng.random() < 0.3:
            victim = rng.choice(requests)
            how = rng.choice(
                [{}, {"choice": 0}, {"choice": 1}, {"reason": FinishReason.STOP, "tokens_kept": 1}]
            )
            for output in both.scheduler.abort(victim.id, both.now, **how):
                both.outputs.append(replace_stop(output))
        both.step()
        if rng.random() < 0.1 and both.in_flight:
            both.settle()
    assert both.scheduler.load().pages_held == 0
    answers = gather(both.outputs)
    assert_exact(answers, requests, both.worker.script)


def replace_stop(output):
    """A stop string's end is natural, but not one that `Script.answer` foresees."""
    if output.finish is None or output.finish.reason is not FinishReason.STOP:
        return output
    if output.finish.completion_tokens != 1 or output.finish.stop_token is not None:
        return output
    return replace(output, finish=replace(output.finish, reason=FinishReason.ABORT))


@RANDOM
@given(anything())
def test_what_was_produced_before_a_restart_is_continued_exactly(case) -> None:
    both, requests, rng = case
    both.add(*requests)
    for _ in range(rng.randint(1, 25)):
        both.step()
    before = gather(both.outputs)

    # A new engine: nothing of the old one is left but the requests and what was committed.
    config = both.scheduler.config
    after = pair(
        num_pages=config.num_pages,
        page_size=config.page_size,
        slots=config.max_num_seqs,
        budget=config.max_step_tokens,
        max_len=config.max_model_len,
        depth=both.depth,
        drafts=rng.randint(0, 3),
        script=both.worker.script,
    )
    resumed = []
    for item in requests:
        done = [before.get((item.id, choice)) for choice in range(item.n)]
        if all(answer is not None and answer.finish is not None for answer in done):
            continue
        produced = tuple(
            () if answer is None else None if answer.finish is not None else tuple(answer.tokens)
            for answer in done
        )
        resumed.append(replace(item, produced=produced))
        after.add(resumed[-1])
    assert_exact(after.finish(), resumed, after.worker.script)


def test_deciding_changes_nothing() -> None:
    """What is decided twice is decided alike, and nothing is written before the commit; but for
    guesses of length, which are brought up to date when they are asked for."""
    both = pair(num_pages=46, policy=greedy(), drafts=2)
    scheduler = both.scheduler
    decide, compared = scheduler._decider.decide, 0

    def twice(*args):
        nonlocal compared
        compared += 1
        decide(*args)
        before = repr((scheduler._running, list(scheduler._waiting), scheduler.load()))
        first, second = decide(*args), decide(*args)
        assert repr(first) == repr(second)
        assert repr((scheduler._running, list(scheduler._waiting), scheduler.load())) == before
        return second

    scheduler._decider.decide = twice
    run(both, workload(20, seed=2))
    assert compared > 50
    assert scheduler.load().preemptions > 0


def test_the_worker_notices_a_page_with_two_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a pool that hands pages out while they are held corrupts, visibly."""
    both = pair(num_pages=20)
    monkeypatch.setattr(PagePool, "take", lambda self, n: tuple(range(1, n + 1)))
    monkeypatch.setattr(Scheduler, "check", lambda self: None)
    with pytest.raises(KVCorruptedError):
        run(both, workload(4, seed=1))


def test_without_the_epoch_check_the_text_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: rows launched before a preemption must not count after it."""
    seat, leave = Memory.seat, Sequence.leave

    def same_epoch(self: Memory, sequence: Sequence, *args):
        self._next_epoch = 1 + sequence.order[1]
        return seat(self, sequence, *args)

    def keeping_epoch(self: Sequence) -> None:
        epoch = self.epoch
        leave(self)
        self.epoch = epoch

    monkeypatch.setattr(Memory, "seat", same_epoch)
    monkeypatch.setattr(Sequence, "leave", keeping_epoch)
    both = pair(num_pages=46, depth=2)
    requests = workload(30, seed=4)
    with pytest.raises((AssertionError, IndexError)):  # output after the end, or pages long gone
        run(both, requests)
