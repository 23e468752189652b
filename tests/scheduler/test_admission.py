"""Who gets in when, and how the token budget of a step is shared."""

from __future__ import annotations

import pytest

from scheduler.admission import make_policy
from scheduler.plan import StepPlan
from scheduler.policy import chunk_size, order_of
from scheduler.request import SchedulerConfig
from tests.scheduler.driving import Pair, greedy, pair, request


def tokens_of(plan: StepPlan) -> int:
    return sum(1 + row.drafts if row.chunk is None else len(row.chunk) for row in plan.rows)


def admission_order(both: Pair) -> list[int]:
    """Seeds tell the requests apart in the plans."""
    return [admit.params.seed for plan in both.worker.plans for admit in plan.admits]


@pytest.mark.parametrize("drafts", [0, 3])
def test_decodes_come_first_and_no_step_exceeds_the_budget(drafts: int) -> None:
    both = pair(budget=16, slots=6, drafts=drafts, num_pages=300)
    both.add(*(request(f"r{i}", range(40), 20, seed=i, arrival=i) for i in range(12)))
    both.finish()
    mixed = 0
    for plan in both.worker.plans:
        assert 0 < tokens_of(plan) <= 16
        kinds = [row.chunk is not None for row in plan.rows]
        assert kinds == sorted(kinds), "decodes first"
        mixed += len(set(kinds)) == 2
    assert mixed > 5


def test_drafts_leave_a_token_to_every_running_sequence() -> None:
    both = pair(budget=12, slots=8, drafts=5)
    both.add(*(request(f"r{i}", [i], 20, seed=i) for i in range(8)))
    for _ in range(12):
        both.step()
    live = [plan for plan in both.worker.plans if all(row.chunk is None for row in plan.rows)]
    assert live
    assert all(len(plan.rows) == 8 for plan in live)
    assert all(tokens_of(plan) == 12 for plan in live)


def test_chunks_end_on_page_boundaries_or_at_the_end() -> None:
    assert chunk_size(0, 100, 30, 16) == 16
    assert chunk_size(16, 100, 50, 16) == 48
    assert chunk_size(96, 100, 50, 16) == 4
    assert chunk_size(0, 100, 7, 16) == 7
    assert chunk_size(7, 100, 12, 16) == 9
    both = pair(budget=23, page_size=8)
    both.add(request("r", range(50), 2))
    both.finish()
    chunks = [len(row.chunk) for plan in both.worker.plans for row in plan.rows if row.chunk]
    assert chunks == [16, 16, 18]


def test_first_come_first_served() -> None:
    both = pair(slots=2)
    both.add(*(request(f"r{i}", range(9), 5, seed=i, arrival=i) for i in range(6)))
    both.finish()
    assert admission_order(both) == list(range(6))


def test_a_lower_priority_number_goes_first_and_waiting_makes_up_for_it() -> None:
    both = pair(slots=1, priority_ageing=10.0)
    items = [
        request("late", [1], 2, seed=0, arrival=30.0),
        request("urgent", [1], 2, seed=1, arrival=30.0, priority=-1),
        request("aged", [1], 2, seed=2, arrival=15.0, priority=1),
        request("young", [1], 2, seed=3, arrival=25.0, priority=1),
    ]
    both.add(*items)
    both.finish()
    assert admission_order(both) == [1, 2, 0, 3]


def test_ageing_keeps_a_stream_of_urgent_requests_from_starving_anyone() -> None:
    both = pair(slots=1, priority_ageing=20.0, depth=0)
    both.add(request("patient", [1], 2, seed=999, arrival=0.0, priority=2))
    for i in range(200):
        both.add(request(f"u{i}", [1], 3, seed=i, arrival=both.now))
        both.step()
        if 999 in admission_order(both):
            break
    assert 20 < both.now <= 2 * 20 * 3 + 5, "two levels: overtaken by 40 steps of arrivals at most"


def test_the_order_is_total_and_fixed() -> None:
    item = request("r", [1], arrival=7.0, priority=2)
    assert order_of(item, 3, 30.0) == (67.0, 3)
    assert order_of(item, 3, 30.0) < order_of(item, 4, 30.0)


# --- behind a blocked head ------------------------------------------------------------------------


def blocked(lookahead: int, **config) -> Pair:
    """Ten of fifteen pages are held by a long-running request, and a ten-page head waits."""
    both = pair(
        policy=make_policy("conservative"),
        num_pages=16,
        slots=4,
        lookahead=lookahead,
        depth=0,
        budget=80,
        **config,
    )
    both.add(request("holder", range(37), 3, seed=1000, arrival=0.0))
    both.step()
    both.add(request("head", range(100, 138), 2, seed=1001, arrival=1.0))
    return both


def test_small_ones_pass_a_head_that_does_not_fit_but_not_without_end() -> None:
    both = blocked(lookahead=3)
    both.scheduler._requests["holder"][0].limit = 38 + 2  # its pages are full, it needs no more
    both.add(*(request(f"s{i}", [i], 1, seed=i, arrival=2.0 + i) for i in range(8)))
    both.finish()
    order = admission_order(both)
    assert order[0] == 1000
    assert order[1:4] == [0, 1, 2]
    assert order[4] == 1001, "three have passed: now it is the head's turn"


def test_without_look_ahead_the_head_blocks() -> None:
    both = blocked(lookahead=0)
    both.add(request("s", [1], 1, seed=0, arrival=2.0))
    both.finish()
    assert admission_order(both) == [1000, 1001, 0]


def test_look_ahead_is_bounded_in_width() -> None:
    both = blocked(lookahead=2)
    both.add(*(request(f"big{i}", range(200, 238), 1, seed=i, arrival=2.0) for i in range(2)))
    both.add(request("small", [1], 1, seed=7, arrival=3.0))
    both.step()
    assert admission_order(both) == [1000], "two were tried, and the small one is third"


def test_a_blocked_queue_is_tried_again_only_when_something_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = pair(num_pages=16, slots=4, depth=1, budget=80)
    both.add(request("holder", range(30), 25, seed=0))
    both.add(request("head", range(100, 140), 2, seed=1, arrival=1.0))
    tried = []
    hits = both.scheduler._memory.hits
    monkeypatch.setattr(
        both.scheduler._memory, "hits", lambda s: (tried.append(s.request.id), hits(s))[1]
    )
    both.finish()
    assert admission_order(both) == [0, 1]
    assert 2 <= tried.count("head") <= 6


def test_a_blocked_head_is_tried_again_when_its_prefix_was_published() -> None:
    both = pair(num_pages=15, budget=16, depth=0, policy=greedy())
    both.add(request("first", range(40), 8, seed=0))
    both.add(request("same", range(41), 1, seed=1, arrival=1.0))
    answers = both.finish()
    first, same = answers["first", 0].finish, answers["same", 0].finish
    assert first is not None
    assert same is not None
    assert same.cached_tokens == 32
    assert same.finished < first.finished


def test_who_waits_for_the_budget_is_tried_again_though_the_head_is_blocked() -> None:
    both = pair(page_size=64, num_pages=8, budget=40, depth=0, max_len=500)
    both.add(request("long", range(55), 5, seed=0))
    both.add(request("head", range(400), 1, seed=1, arrival=1.0))
    both.add(request("next", range(100, 130), 1, seed=2, arrival=2.0))
    finish = both.finish()["next", 0].finish
    assert finish is not None
    assert finish.admitted == 2.0, "as soon as the long one leaves part of the step"


def test_admission_leaves_running_sequences_the_pages_they_will_need() -> None:
    both = pair(num_pages=11, slots=8, depth=0, budget=80, policy=make_policy("conservative"))
    both.add(*(request(f"r{i}", [i] * 8, 4, seed=i, arrival=i) for i in range(4)))
    both.step()
    # Three that will have three pages each; a fourth would fit now, but not to its end.
    assert admission_order(both) == [0, 1, 2]


# --- long prompts and short ones ------------------------------------------------------------------


def test_a_short_prompt_does_not_wait_for_a_long_one_to_end() -> None:
    both = pair(budget=64, num_pages=400, max_len=1000, depth=0)
    both.add(request("long", range(900), 2, seed=0, arrival=0.0))
    both.step()
    both.add(request("short", range(900, 912), 1, seed=1, arrival=1.0))
    both.step()
    assert [output.request_id for output in both.outputs] == ["short"]
    answers = both.finish()
    assert len(both.worker.plans) <= 900 // 60 + 2, "what the short one leaves is not wasted"
    assert len(answers["long", 0].tokens) == 2


def test_long_prompts_are_served_one_after_the_other() -> None:
    both = pair(budget=64, num_pages=400, max_len=1000, depth=0)
    both.add(*(request(f"r{i}", range(i, i + 600), 1, seed=i, arrival=i) for i in range(2)))
    first: dict[str, float] = {}
    while both.scheduler.has_work():
        both.step()
        for output in both.outputs:
            first.setdefault(output.request_id, both.now)
    assert first["r0"] <= 600 // 60 + 2
    assert first["r1"] <= 1200 // 60 + 3


@pytest.mark.parametrize("rows", [2, 4])
def test_few_long_prompts_share_a_step(rows: int) -> None:
    both = pair(budget=64, num_pages=900, max_len=1000, depth=0, long_prefill_rows=rows)
    both.add(*(request(f"r{i}", range(i, i + 100), 1, seed=i, arrival=i) for i in range(9)))
    both.finish()
    left = {admit.slot: 100 for plan in both.worker.plans for admit in plan.admits}
    most = 0
    for plan in both.worker.plans:
        left |= {admit.slot: 100 for admit in plan.admits}
        most = max(most, sum(left[row.slot] > 64 // rows for row in plan.rows))
        for row in plan.rows:
            left[row.slot] -= len(row.chunk or ())
    assert 0 < most < rows


def test_shared_hits_cost_their_pages_once() -> None:
    both = pair(num_pages=7, policy=greedy(), depth=0)
    both.add(request("first", range(17), 1, seed=0))
    both.finish()  # four cached pages, two blank ones
    both.add(*(request(f"r{i}", range(17), 1, seed=1 + i) for i in range(2)))
    both.step()
    assert admission_order(both) == [0, 1, 2], "four hits and one page each: six in all"


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_pages": 1},
        {"max_step_tokens": 3, "max_num_seqs": 4},
        {"priority_ageing": 0.0},
        {"page_size": 0},
        {"long_prefill_rows": 1},
        {"ttft_target": 0.0},
        {"mtpot_target": float("inf")},
    ],
)
def test_impossible_limits_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        SchedulerConfig(**{"num_pages": 10, **wrong})


@pytest.mark.parametrize("name", ["ttft_target", "mtpot_target"])
@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_target_is_a_positive_number_of_seconds(name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a positive number"):
        request("r", [1], **{name: wrong})
