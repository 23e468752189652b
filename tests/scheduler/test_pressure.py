"""When pages run out: who retreats, in which order, and who never does."""

from __future__ import annotations

import pytest

from scheduler.admission import Admission, Policy, Watermark
from scheduler.decide import Decider
from scheduler.lengths import LengthWindow, PastFuture
from scheduler.pages import PagePool
from scheduler.request import FinishReason
from tests.scheduler.driving import Pair, assert_exact, greedy, pair, request

NEVER = 999  # a token that nobody says: a request with it might end at any time, for all one knows


def crowd(count: int, num_pages: int, tokens: int = 24, **config) -> tuple[Pair, list]:
    """Sequences that all reach their page boundaries in the same steps."""
    both = pair(num_pages=num_pages, slots=count, policy=greedy(), **config)
    items = [request(f"r{i}", [i] * 8, tokens, seed=i, arrival=i) for i in range(count)]
    both.add(*items)
    return both, items


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_newest_go_and_the_first_never_does(depth: int) -> None:
    both, items = crowd(6, num_pages=20, depth=depth)
    answers = both.finish()
    assert_exact(answers, items, both.worker.script)
    preemptions = [answers[item.id, 0].finish.preemptions for item in items]
    assert preemptions[0] == preemptions[1] == 0
    assert preemptions[-1] > 0
    assert sum(preemptions) == both.scheduler.load().preemptions
    ends = [answers[item.id, 0].finish.finished for item in items]
    assert ends == sorted(ends)


def preemptions_with(depth: int) -> int:
    both, _ = crowd(8, num_pages=18, depth=depth)
    both.finish()
    return both.scheduler.load().preemptions


def test_a_row_stalls_for_promised_pages_where_preempting_on_would_empty_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both, _ = crowd(8, num_pages=25, depth=1)
    while not both.scheduler.load().preemptions:
        both.step()
    assert both.scheduler.load().preemptions == 2, "two pages each: they feed the other six"
    assert both.scheduler.load().running == 6
    with_stall = preemptions_with(depth=2)
    assert with_stall <= preemptions_with(depth=0) + 2
    # Negative control: fenced pages that do not count.
    monkeypatch.setattr(PagePool, "fenced", 0)
    assert preemptions_with(depth=2) > with_stall + 2


def test_nobody_is_admitted_while_somebody_stalls() -> None:
    both, _ = crowd(8, num_pages=30, depth=1)
    while not both.scheduler.load().preemptions:
        both.step()
    assert both.worker.plans[-1].admits == ()


def test_drafts_go_before_sequences() -> None:
    """All pages are held and full: the drafts of one must not cost the other its place."""
    both = pair(num_pages=5, drafts=3, depth=0, policy=greedy())
    items = [request("a", [1] * 7, 8, seed=1), request("b", [2] * 7, 2, seed=2, arrival=1.0)]
    both.add(*items)
    assert_exact(both.finish(), items, both.worker.script)
    assert both.scheduler.load().preemptions == 0
    assert any(row.drafts for plan in both.worker.plans for row in plan.rows)


def test_resuming_is_mostly_a_prefix_hit() -> None:
    both = pair(num_pages=38, slots=4, policy=greedy(), depth=1)
    lengths = [5, 5, 5, 16]
    items = [request(f"r{i}", range(i, i + 33), lengths[i], seed=i, arrival=i) for i in range(4)]
    both.add(*items)
    answers = both.finish()
    assert_exact(answers, items, both.worker.script)
    load = both.scheduler.load()
    assert load.preemptions == 1
    assert 0 < load.recomputed_tokens <= 8, "of more than 33"


def test_a_preempted_sequence_keeps_its_place_and_its_account() -> None:
    both, items = crowd(4, num_pages=13, depth=1)
    late = request("late", [9], 2, seed=99, arrival=50.0)
    both.add(late)
    answers = both.finish()
    assert_exact(answers, [*items, late], both.worker.script)
    last = answers["r3", 0].finish
    assert last is not None
    assert last.reason is FinishReason.LENGTH
    assert last.preemptions > 0
    assert last.admitted is not None
    assert last.admitted <= 2


def test_an_urgent_sequence_is_not_the_victim_of_an_ordinary_one() -> None:
    both, items = crowd(5, num_pages=17, depth=1)
    urgent = request("urgent", [5] * 8, 24, seed=77, arrival=100.0, priority=-10)
    both.scheduler.abort("r4", 0.0)
    both.add(urgent)
    answers = both.finish()
    assert answers["urgent", 0].finish.preemptions == 0
    assert both.scheduler.load().preemptions > 0
    assert_exact(answers, [*items[:4], urgent], both.worker.script)


def victims_of(both: Pair) -> list[list[str]]:
    """Whom each decision to come preempts, filled as the pair runs."""
    decide, found = both.scheduler._decider.decide, []

    def watched(*args):
        decision = decide(*args)
        victims = decision.running[decision.keep :]
        if victims:
            found.append([f"{s.request.id}/{s.choice}" for s in victims])
        return decision

    both.scheduler._decider.decide = watched
    return found


@pytest.mark.parametrize("depth", [0, 1])
def test_the_choices_of_a_request_are_paused_together(depth: int) -> None:
    both = pair(num_pages=22, slots=8, policy=greedy(), depth=depth)
    items = [
        request("old", [1] * 8, 24, seed=1),
        request("group", [2] * 8, 24, seed=2, arrival=1.0, n=3),
        request("new", [3] * 8, 6, seed=3, arrival=2.0),
    ]
    victims = victims_of(both)
    both.add(*items)
    answers = both.finish()
    assert_exact(answers, items, both.worker.script)
    assert ["group/0", "group/1", "group/2"] in victims
    assert not any("old/0" in group for group in victims)


def test_the_first_in_order_goes_on_though_its_own_choices_are_paused() -> None:
    both = pair(num_pages=14, slots=4, policy=greedy(), depth=1)
    item = request("group", [2] * 8, 40, seed=2, n=3)
    victims = victims_of(both)
    both.add(item)
    assert_exact(both.finish(), [item], both.worker.script)
    assert victims
    assert not any("group/0" in group for group in victims)


def test_a_tenant_is_no_victim_of_anothers_priority() -> None:
    """Those of the most served tenant go first, though it called them all urgent."""
    both = pair(num_pages=26, slots=8, policy=greedy(), depth=1)
    loud = [
        request(f"loud{i}", [i] * 8, 24, seed=i, arrival=i, priority=-100, tenant="loud")
        for i in range(5)
    ]
    quiet = request("quiet", [9] * 8, 24, seed=9, arrival=9.0, tenant="quiet")
    victims = victims_of(both)
    both.add(*loud, quiet)
    assert_exact(both.finish(), [*loud, quiet], both.worker.script)
    assert victims[0][-1].startswith("loud")
    assert not any("quiet/0" in group for group in victims)


def short_of_pages(**second) -> Pair:
    """All pages are full, and the first of three is about to end: the second needs one before."""
    both = pair(num_pages=7, depth=0, policy=greedy())
    both.add(
        request("first", [0] * 5, 3, seed=0),
        request("second", [1] * 7, 5, seed=1, arrival=1.0, **second),
        request("third", [2] * 7, 5, seed=2, arrival=2.0),
    )
    both.finish()
    return both


def test_equals_wait_for_an_end_instead_of_preempting_each_other() -> None:
    load = short_of_pages().scheduler.load()
    assert load.preemptions == 0
    assert load.rows_stalled > 0


def test_the_more_urgent_and_other_tenants_do_not_wait_for_an_end() -> None:
    assert short_of_pages(priority=-1).scheduler.load().preemptions == 1
    assert short_of_pages(tenant="another").scheduler.load().preemptions == 1


@pytest.mark.parametrize("depth", [0, 1])
def test_pages_are_left_to_the_first_as_long_as_it_takes_them_to_end(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of 80 tokens and thereabouts, of which each began 20 steps after the one before it.
    They do not fit all at once, but the first is nearly over when pages run out."""
    window = LengthWindow()
    for length in range(75, 86):
        for _ in range(20):
            window.add(length, cut_short=False)

    def preemptions() -> int:
        policy = Policy(PastFuture(window), Watermark(-9.0))  # admits whoever fits now
        both = pair(num_pages=52, depth=depth, policy=policy)
        items = [request(f"r{i}", [i] * 8, 80, seed=i, stop=[NEVER]) for i in range(6)]
        for item in items:
            both.add(item)
            for _ in range(20):
                both.step()
        assert_exact(both.finish(), items, both.worker.script)
        return both.scheduler.load().preemptions

    assert preemptions() == 0
    # Negative control: nobody knows when one ends.
    monkeypatch.setattr(Admission, "first_ends", lambda *_: None)
    assert preemptions() > 0


def test_who_may_take_no_pages_goes_on_without_drafts_to_the_end_of_its_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Decider, "_growing", lambda *_: 1)
    both = pair(num_pages=30, drafts=3, depth=0, policy=greedy())
    items = [request(f"r{i}", [i] * 6, 40, seed=i, arrival=i) for i in range(2)]
    both.add(*items)
    for _ in range(6):
        both.step()
    second = both.scheduler._running[1]
    assert len(second.pages) == 2
    assert len(second.tokens) == 9, "eight computed, and one to come"
    assert_exact(both.finish(), items, both.worker.script)
