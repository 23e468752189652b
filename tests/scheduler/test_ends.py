"""Every sequence ends exactly once, for the right reason, with its account in order."""

from __future__ import annotations

import pytest

from scheduler.gate import Overloaded
from scheduler.plan import RowResult, StepResult
from scheduler.request import FinishReason
from scheduler.scheduler import ContextTooLong
from tests.fakes import Script
from tests.scheduler.driving import NATURAL, Answer, Pair, assert_exact, gather, pair, request

PROMPT = tuple(range(10, 20))


def text_of(name: str = "r", count: int = 12, **fields) -> tuple[int, ...]:
    """What the scripted model says after PROMPT when nothing stops it."""
    return Script().answer(request(name, PROMPT, count, **fields))[0]


def alone(item, both: Pair | None = None) -> Answer:
    both = both or pair()
    both.add(item)
    return both.finish()[item.id, 0]


def test_a_stop_token_ends_it_and_is_not_output() -> None:
    text = text_of()
    at = next(i for i in range(3, 12) if text[i] not in text[:i])
    answer = alone(request("r", PROMPT, 12, stop=[text[at]], logprobs=1))
    assert tuple(answer.tokens) == text[:at]
    assert len(answer.logprobs) == at
    assert answer.finish is not None
    assert answer.finish.reason is FinishReason.STOP
    assert answer.finish.stop_token == text[at]
    assert answer.finish.completion_tokens == at + 1


@pytest.mark.parametrize("drafts", [0, 4])
def test_before_min_tokens_a_stop_token_is_a_token_like_any_other(drafts: int) -> None:
    text = text_of()
    answer = alone(
        request("r", PROMPT, 12, stop=set(text), min_tokens=5),
        pair(drafts=drafts, script=Script(acceptance=1.0)),
    )
    assert tuple(answer.tokens) == text[:5]
    assert answer.finish is not None
    assert answer.finish.stop_token == text[5]


def test_a_stop_token_at_the_length_is_a_stop() -> None:
    text = text_of()
    at = next(i for i in range(3, 12) if text[i] not in text[:i])
    finish = alone(request("r", PROMPT, at + 1, stop=[text[at]])).finish
    assert finish is not None
    assert finish.reason is FinishReason.STOP
    finish = alone(request("r", PROMPT, at, stop=[text[at]])).finish
    assert finish is not None
    assert finish.reason is FinishReason.LENGTH


@pytest.mark.parametrize("drafts", [0, 3])
def test_length_ends_it_where_max_tokens_says(drafts: int) -> None:
    answer = alone(request("r", PROMPT, 7), pair(drafts=drafts, script=Script(acceptance=1.0)))
    assert tuple(answer.tokens) == text_of()[:7]
    assert answer.finish is not None
    assert answer.finish.reason is FinishReason.LENGTH
    assert answer.finish.completion_tokens == 7


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("drafts", [0, 3])
def test_the_context_ends_it_and_no_position_beyond_is_written(depth: int, drafts: int) -> None:
    both = pair(max_len=16, depth=depth, drafts=drafts, script=Script(acceptance=0.7))
    answer = alone(request("r", PROMPT, 50), both)
    assert tuple(answer.tokens) == text_of()[:6]
    assert answer.finish is not None
    assert answer.finish.reason is FinishReason.LENGTH
    assert max(len(s.pages) for s in both.worker._slots.values()) <= 4
    assert max(len(s.tokens) for s in both.worker._slots.values()) <= 17


def test_the_pool_bounds_a_sequence_as_the_context_does() -> None:
    answer = alone(request("r", PROMPT, 50), pair(num_pages=5, depth=1))
    assert tuple(answer.tokens) == text_of()[:6]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_no_row_is_launched_for_what_is_sure_to_end(depth: int) -> None:
    both = pair(depth=depth)
    alone(request("r", PROMPT, 7), both)
    assert sum(row.samples for plan in both.worker.plans for row in plan.rows) == 7


def test_the_account() -> None:
    both = pair(depth=0, budget=8)
    both.add(request("a", PROMPT, 3))
    both.finish()
    both.now = 100.0
    both.add(request("r", PROMPT, 3, arrival=100.0))
    finish = both.finish()["r", 0].finish
    assert finish is not None
    assert (finish.arrival, finish.admitted, finish.first_token) == (100.0, 101.0, 101.0)
    assert finish.finished == 103.0
    assert (finish.prompt_tokens, finish.cached_tokens, finish.completion_tokens) == (10, 8, 3)
    assert finish.preemptions == 0
    load = both.scheduler.load()
    assert (load.prompt_tokens, load.generated_tokens) == (20, 6)
    assert (load.prefix_queries, load.prefix_hits) == (20, 8)


# --- ended from outside ---------------------------------------------------------------------------


def test_abort_while_waiting_running_in_flight_and_after() -> None:
    both = pair(slots=1, depth=1)
    both.add(request("a", PROMPT, 9), request("b", PROMPT, 9))
    both.abort("b")
    for _ in range(4):
        both.step()
    assert both.in_flight
    both.abort("a")
    both.abort("a")
    both.abort("never seen")
    answers = both.finish()
    for name in "ab":
        finish = answers[name, 0].finish
        assert finish is not None
        assert finish.reason is FinishReason.ABORT
    assert tuple(answers["a", 0].tokens) == text_of()[: len(answers["a", 0].tokens)]
    assert answers["b", 0].tokens == []


def test_a_row_launched_before_an_abort_is_stale_after_it() -> None:
    both = pair(slots=2, depth=1)
    both.add(request("a", PROMPT, 9))
    both.step()
    both.abort("a")
    both.settle()
    assert [output.tokens for output in both.outputs] == [()]
    assert both.scheduler.load().generated_tokens == 0


def test_slots_and_pages_of_an_abort_are_fenced_until_the_step_settles() -> None:
    both = pair(slots=1, num_pages=8, depth=1)
    both.add(request("a", PROMPT, 9))
    both.step()
    both.abort("a")
    assert both.scheduler.load().pages_held == 3
    both.add(request("b", PROMPT, 9))
    assert both.scheduler.plan(1.0) is None, "the only slot is behind the fence"
    both.settle()
    assert both.scheduler.load().pages_held == 0
    assert both.scheduler.plan(1.0) is not None


def test_a_stop_string_is_a_natural_end() -> None:
    both = pair()
    both.add(request("a", PROMPT, 9))
    for _ in range(6):
        both.step()
    both.abort("a", reason=FinishReason.STOP, tokens_kept=2)
    finish = both.finish()["a", 0].finish
    assert finish is not None
    assert finish.reason is FinishReason.STOP
    assert finish.completion_tokens == 2


def test_deadlines_end_the_waiting_and_the_running() -> None:
    both = pair(slots=1, depth=0)
    both.add(request("a", PROMPT, 50, deadline=5.0), request("b", PROMPT, 5, deadline=4.5))
    both.add(request("c", PROMPT, 2, deadline=50.0))
    answers = both.finish()
    for name, when in (("a", 5.0), ("b", 5.0)):
        finish = answers[name, 0].finish
        assert finish is not None
        assert finish.reason is FinishReason.TIMEOUT
        assert finish.message == "deadline exceeded"
        assert finish.finished == when
    assert len(answers["a", 0].tokens) == 4
    assert answers["c", 0].finish is not None
    assert answers["c", 0].finish.reason is FinishReason.LENGTH


def test_the_queue_deadline_ends_only_what_was_never_admitted() -> None:
    both = pair(slots=1, depth=0)
    both.add(request("a", PROMPT, 12, n=2, queue_deadline=3.0))  # its sibling waits longer
    both.add(request("b", PROMPT, 5, n=2, queue_deadline=6.0))
    both.add(request("c", PROMPT, 2, queue_deadline=60.0))
    answers = both.finish()
    for choice in (0, 1):
        assert_natural(answers["a", choice])
        finish = answers["b", choice].finish
        assert finish is not None
        assert (finish.reason, finish.finished) == (FinishReason.QUEUE_TIMEOUT, 6.0)
        assert finish.admitted is None
        assert finish.message
    assert_natural(answers["c", 0])


def assert_natural(answer: Answer) -> None:
    assert answer.finish is not None
    assert answer.finish.reason in NATURAL


def test_a_deadline_does_not_outlive_its_request() -> None:
    both = pair(slots=1)
    both.add(request("a", PROMPT, 5, queue_deadline=2.0))
    both.abort("a")
    both.outputs.clear()
    both.add(request("a", PROMPT, 5, deadline=90.0))
    assert_natural(both.finish()["a", 0])


def test_the_queue_is_bounded_in_tokens() -> None:
    both = pair(slots=1, max_queued_tokens=2 * len(PROMPT))
    both.add(request("large", range(100), 3))  # an empty queue takes any
    with pytest.raises(Overloaded, match="100 tokens"):
        both.add(request("early", PROMPT, 3))
    both.step()
    both.add(request("a", PROMPT, 3), request("b", PROMPT, 3))
    with pytest.raises(Overloaded, match="tokens"):
        both.add(request("c", [1], 3))
    both.finish()
    both.add(request("d", PROMPT, 3, n=9))
    both.finish()


def test_an_end_without_a_step_is_handed_out_all_the_same() -> None:
    both = pair()
    both.add(request("a", PROMPT, 5, deadline=1.0))
    assert both.scheduler.plan(2.0) is None
    assert both.scheduler.has_work()
    (output,) = both.scheduler.take_outputs()
    assert output.finish is not None
    assert not both.scheduler.has_work()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_row_that_fails_ends_its_sequence_alone(depth: int) -> None:
    both = pair(depth=depth)
    both.worker.fail_row = lambda step, index, row: "not finite" if (step, index) == (3, 1) else ""
    items = [request(name, PROMPT, 8, seed=i) for i, name in enumerate("abc")]
    both.add(*items)
    answers = both.finish()
    failed = answers["b", 0].finish
    assert failed is not None
    assert (failed.reason, failed.message) == (FinishReason.ERROR, "not finite")
    assert_exact(answers, items, both.worker.script)


# --- what never starts ----------------------------------------------------------------------------


def test_what_can_never_run_is_refused() -> None:
    both = pair(max_len=16)
    both.add(request("fits", range(15)))
    with pytest.raises(ContextTooLong, match="at most 15"):
        both.add(request("long", range(16)))
    with pytest.raises(ContextTooLong):
        pair(num_pages=4).add(request("long", range(12)))
    with pytest.raises(ValueError, match="in use"):
        both.add(request("fits", range(3)))
    assert both.scheduler.load().waiting == 1


def test_a_full_queue_refuses() -> None:
    both = pair(max_queued_requests=2)
    both.add(request("a", PROMPT), request("b", PROMPT))
    with pytest.raises(Overloaded):
        both.add(request("c", PROMPT))
    both.finish()
    both.add(request("c", PROMPT))


def test_results_must_come_in_order_and_in_shape() -> None:
    both = pair()
    both.add(request("a", PROMPT))
    first, second = both.scheduler.plan(1.0), both.scheduler.plan(1.0)
    assert first is not None
    assert second is not None
    with pytest.raises(ValueError, match="oldest"):
        both.scheduler.settle(second, StepResult(1, (RowResult((1,)),)), 1.0)
    with pytest.raises(ValueError, match="0 results for 1 rows"):
        both.scheduler.settle(first, StepResult(0, ()), 1.0)


# --- several choices, and a life before -----------------------------------------------------------


def chunk_tokens(both: Pair) -> int:
    return sum(len(row.chunk or ()) for plan in both.worker.plans for row in plan.rows)


@pytest.mark.parametrize("depth", [0, 1])
def test_choices_share_one_prompt_and_differ(depth: int) -> None:
    both = pair(depth=depth, budget=8)
    item = request("r", range(10, 30), 6, n=3)
    both.add(item)
    answers = both.finish()
    assert_exact(answers, [item], both.worker.script)
    assert len({tuple(answers["r", choice].tokens) for choice in range(3)}) == 3
    assert chunk_tokens(both) == 20 + 2 * 4, "only the last, unshared page is computed again"
    assert both.scheduler.load().prompt_tokens == 20


def test_when_the_first_choice_goes_another_computes_the_prompt() -> None:
    both = pair(depth=1, budget=8)
    item = request("r", range(10, 30), 6, n=3)
    both.add(item)
    both.step()
    both.abort("r", choice=0)
    assert_exact(both.finish(), [item], both.worker.script)
    assert chunk_tokens(both) <= 8 + 20 + 4
    assert both.scheduler.load().waiting == 0


def test_a_parked_choice_can_be_aborted() -> None:
    both = pair()
    item = request("r", range(10, 30), 6, n=3)
    both.add(item)
    both.abort("r", choice=2)
    answers = both.finish()
    assert_exact(answers, [item], both.worker.script)
    assert answers["r", 2].tokens == []
    assert chunk_tokens(both) == 20 + 4, "the other one stayed parked"


def test_what_was_produced_counts_as_output() -> None:
    text = text_of()
    both = pair()
    both.add(request("r", PROMPT, 8, produced=(text[:5],)))
    answer = both.finish()["r", 0]
    assert tuple(answer.tokens) == text[5:8]
    assert answer.finish is not None
    assert (answer.finish.prompt_tokens, answer.finish.completion_tokens) == (10, 8)
    assert both.worker.plans[0].admits[0].prompt_len == 10


def test_cached_tokens_are_of_the_prompt() -> None:
    both = pair()
    both.add(request("a", PROMPT, 12))
    both.finish()
    both.add(request("r", PROMPT, 12, produced=(text_of()[:9],)))
    finish = both.finish()["r", 0].finish
    assert finish is not None
    assert finish.cached_tokens == 10, "of sixteen that were found"


def test_what_was_complete_before_a_restart_ends_at_once() -> None:
    both = pair()
    both.add(request("r", PROMPT, 5, produced=(text_of()[:5], text_of()[:2]), n=2))
    answers = both.finish()
    first = answers["r", 0].finish
    assert first is not None
    assert (first.reason, first.completion_tokens) == (FinishReason.LENGTH, 5)
    assert answers["r", 0].tokens == []
    assert len(answers["r", 1].tokens) == 3


def test_prompt_logprobs_come_once_and_start_over_after_a_preemption() -> None:
    both = pair(num_pages=16, depth=1, budget=8, slots=4, lookahead=0)
    items = [request(f"r{i}", range(i, i + 17), 12, prompt_logprobs=1, arrival=i) for i in range(4)]
    both.add(*items)
    assert_exact(both.finish(), items, both.worker.script)
    assert gather(both.outputs)["r0", 0].prompt_logprobs is not None
