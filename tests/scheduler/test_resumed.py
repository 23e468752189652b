"""Requests that an engine before this one had begun: the same text from wherever it was cut."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.admission import make_policy
from scheduler.choices import choices_of
from scheduler.lengths import LengthWindow, PastFuture
from scheduler.request import FinishReason, Request, SamplingParams, SchedulerConfig
from tests.fakes import Script
from tests.scheduler.driving import EOS, Pair, assert_exact, gather, greedy, pair, request

PROMPT = tuple(range(10, 28))  # four pages and a half


def answers_of(item: Request) -> list[tuple[int, ...]]:
    return [Script().answer(item, choice)[0] for choice in range(item.n)]


def chunk_tokens(both: Pair) -> int:
    rows = [row for plan in both.worker.plans for row in plan.rows]
    return sum(len(row.chunk) for row in rows if row.chunk is not None)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("drafts", "budget"), [(0, 64), (3, 9)])
def test_any_cut_gives_the_same_text(seed: int, drafts: int, budget: int) -> None:
    """Chunks smaller than what is known; log-probabilities of what is new, and of nothing else."""
    fields = {"stop": [EOS], "min_tokens": 6, "logprobs": 1, "prompt_logprobs": 1}
    item = request("r", PROMPT, 40, seed=seed, **fields)
    (text,) = answers_of(item)
    for cut in range(len(text) + (len(text) < 40)):  # at 40 its end had come with its last token
        both = pair(drafts=drafts, budget=budget)
        resumed = replace(item, produced=(text[:cut],))
        both.add(resumed)
        assert_exact(both.finish(), [resumed], both.worker.script)
        assert both.worker.plans[0].admits[0].prompt_len == len(PROMPT)


@pytest.mark.parametrize("ended", [0, 1, 2])
def test_choices_go_on_from_where_each_was_and_share_the_prompt(ended: int) -> None:
    item = request("r", PROMPT, 12, n=3)
    cuts = [5, 0, 9]
    produced = tuple(
        None if choice == ended else text[: cuts[choice]]
        for choice, text in enumerate(answers_of(item))
    )
    both = pair()
    resumed = replace(item, produced=produced)
    both.add(resumed)
    assert both.scheduler.load().waiting == 2
    answers = both.finish()
    assert ("r", ended) not in answers, "it was told of its end before"
    assert_exact(answers, [resumed], both.worker.script)
    known = [len(PROMPT) + len(tokens) for tokens in produced if tokens is not None]
    shared = 16  # whole pages of the prompt
    assert chunk_tokens(both) == known[0] + known[1] - shared
    assert {admit.choice for plan in both.worker.plans for admit in plan.admits} == (
        {0, 1, 2} - {ended}
    )


def test_a_request_that_has_nothing_left_is_none() -> None:
    with pytest.raises(ValueError, match="ended before"):
        request("r", PROMPT, n=2, produced=(None, None))


def test_it_was_let_in_before_and_is_not_refused() -> None:
    both = pair(max_queued_requests=1, max_queued_tokens=20, slots=1)
    both.add(request("runs", PROMPT, 30))
    both.step()
    items = [
        replace(request(f"r{i}", PROMPT, 6, seed=i, ttft_target=1e-9), produced=((),))
        for i in range(4)
    ]
    both.add(*items)
    assert_exact(both.finish(), items, both.worker.script)


def test_its_time_limits_are_still_there() -> None:
    both = pair()
    both.now = 100.0
    late = request("late", PROMPT, 30, arrival=20.0, deadline=99.0, produced=((3, 4),))
    waited = request("waited", PROMPT, 30, arrival=20.0, queue_deadline=99.0, produced=((),))
    both.add(late, waited)
    answers = both.finish()
    late_end, waited_end = answers["late", 0].finish, answers["waited", 0].finish
    assert late_end is not None
    assert waited_end is not None
    assert (late_end.reason, late_end.completion_tokens) == (FinishReason.TIMEOUT, 2)
    assert waited_end.reason is FinishReason.QUEUE_TIMEOUT


def test_pressure_and_preemption_change_nothing() -> None:
    items = []
    for i in range(10):
        item = request(f"r{i}", PROMPT[: 3 + i], 40, seed=i, arrival=i, stop=[EOS], n=1 + i % 2)
        cut = tuple(text[: (7 * i) % len(text)] for text in answers_of(item))
        items.append(replace(item, produced=cut))
    both = pair(num_pages=30, policy=greedy())
    both.add(*items)
    assert_exact(both.finish(), items, both.worker.script)
    assert both.scheduler.load().preemptions > 0


def test_what_is_computed_again_counts_as_that() -> None:
    both = pair()
    both.add(request("r", PROMPT, 12, produced=(answers_of(request("r", PROMPT, 12))[0][:5],)))
    both.finish()
    load = both.scheduler.load()
    assert load.recomputed_tokens == len(PROMPT) + 5
    assert (load.prompt_tokens, load.prefix_queries) == (0, 0)
    assert load.generated_tokens == 7


def test_its_length_is_foreseen_from_what_it_has_and_kept_whole() -> None:
    window = LengthWindow(doubt=0.01)
    for length in range(1, 101):
        window.add(length, cut_short=False)
    guess = PastFuture(window)
    params = SamplingParams(max_tokens=1000, stop_token_ids=frozenset((EOS,)))
    guesses = []
    for produced in (0, 60, 90):
        of_this = []
        for _ in range(40):
            item = Request("r", (1, 2, 3), params, 0.0, produced=((8,) * produced,))
            (sequence,) = choices_of(item, SchedulerConfig(num_pages=10), 10**6, 0)
            guess.begin(sequence)
            assert produced < sequence.guess <= 100
            of_this.append(sequence.guess)
        guesses.append(sum(of_this) / 40)
    # Uniform over what is longer: the middle between it and the longest.
    assert guesses == pytest.approx([50.5, 80.5, 95.5], abs=1.5)

    policy = make_policy()
    item = request("r", PROMPT, 12)
    both = pair(policy=policy)
    both.add(replace(item, produced=(answers_of(item)[0][:5],)))
    both.finish()
    assert policy.lengths.window.state()["lengths"] == [[12, 1]]  # type: ignore[attr-defined]


def test_an_abort_ends_what_is_left_of_it() -> None:
    both = pair()
    both.add(request("r", PROMPT, 40, n=3, produced=((1, 2), None, (3,))))
    both.step()
    both.abort("r")
    ends = {key: answer.finish for key, answer in gather(both.outputs).items()}
    assert set(ends) == {("r", 0), ("r", 2)}
    assert not both.scheduler._requests
