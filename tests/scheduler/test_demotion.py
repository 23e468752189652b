"""Demotion under pressure: what it saves, whom it touches, and that everything is given back."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from scheduler.admission import Watermark
from scheduler.decide import Decider, Decision
from scheduler.policy import demotable
from scheduler.request import Request, SchedulerConfig
from scheduler.sequence import Sequence
from tests.scheduler.driving import EOS, Pair, assert_exact, gather, greedy, pair, request
from tests.scheduler.test_invariance import replace_stop, run, workload

KEPT = 8  # latest positions that are never demoted


def crowd(count: int, num_pages: int, tokens: int = 60, **config) -> tuple[Pair, list[Request]]:
    """Sequences that all reach their page boundaries in the same steps."""
    both = pair(num_pages=num_pages, slots=count, policy=greedy(), **config)
    items = [request(f"r{i}", [i] * 8, tokens, seed=i, arrival=i) for i in range(count)]
    both.add(*items)
    return both, items


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_pages_are_demoted_instead_of_sequences_paused(depth: int) -> None:
    paused, items = crowd(4, 57, depth=depth)
    paused.finish()
    assert paused.scheduler.load().preemptions > 0
    assert paused.scheduler.load().pages_demoted == 0

    demoted, items = crowd(4, 57, depth=depth, demote_all_but=KEPT)
    answers = demoted.finish()
    assert_exact(answers, items, demoted.worker.script)
    load = demoted.scheduler.load()
    assert load.preemptions == 0
    assert load.pages_demoted > 0
    of = [answers[item.id, 0].finish.demoted for item in items]
    assert sum(of) == load.pages_demoted * 4
    assert of[0] == 0, "the first in order loses nothing"
    assert of[-1] > 0


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_when_nothing_is_left_to_demote_sequences_are_paused(depth: int) -> None:
    both, items = crowd(6, 41, depth=depth, demote_all_but=KEPT)
    answers = both.finish()
    assert_exact(answers, items, both.worker.script)
    finishes = [answers[item.id, 0].finish for item in items]
    assert both.scheduler.load().preemptions > 0
    assert any(finish.preemptions and finish.demoted for finish in finishes)
    assert finishes[0].preemptions == finishes[0].demoted == 0


def test_what_is_never_demoted() -> None:
    assert list(demotable(33, 8, 4)) == [1, 2, 3, 4, 5]
    assert list(demotable(12, 8, 4)) == list(demotable(3, 8, 4)) == []
    both, _ = crowd(4, 57, demote_all_but=KEPT)
    both.finish()
    taken = [demotion for plan in both.worker.plans for demotion in plan.demotions]
    assert taken
    assert all(demotion.place > 0 for demotion in taken)


def test_the_oldest_pages_go_first_and_two_make_room_for_one() -> None:
    both, _ = crowd(4, 57, depth=0, demote_all_but=KEPT)
    while not both.scheduler.load().pages_demoted:
        both.step()
    plan = both.worker.plans[-1]
    assert [demotion.place for demotion in plan.demotions][:2] == [1, 2]
    first, second = plan.demotions[:2]
    assert first.slot == second.slot
    assert first.copy is None, "its upper half is where it was"
    assert second.copy is not None
    assert (first.half, second.half) == (~(2 * first.page), ~(2 * first.page + 1))
    assert plan.admits == ()
    assert second.page in [page for row in plan.rows for page in row.new_pages]


def test_cached_pages_go_before_any_is_demoted() -> None:
    both = pair(num_pages=40, slots=2, policy=greedy(), depth=0, demote_all_but=KEPT)
    both.add(request("before", range(40), 2, seed=3))
    both.finish()
    assert both.scheduler.load().pages_cached >= 10
    both.add(*(request(f"r{i}", [i] * 8, 66, seed=i) for i in range(2)))
    both.finish()
    assert both.scheduler.load().pages_demoted == both.scheduler.load().preemptions == 0


def test_what_was_computed_after_a_demotion_is_not_shared() -> None:
    """Another request for the same text finds what came before the first half, and no more."""
    both, items = crowd(4, 57, depth=0, demote_all_but=KEPT)
    answers = both.finish()
    last = items[-1]
    assert answers[last.id, 0].finish.demoted > 0
    text = [*last.prompt, *answers[last.id, 0].tokens]
    both.add(request("again", text, 2, seed=9, arrival=99.0))
    again = both.finish()["again", 0].finish
    assert again.cached_tokens == 4, "the first page"


@pytest.mark.parametrize("host_pages", [0, 30])
def test_who_was_paused_begins_anew_and_stays_marked(host_pages: int) -> None:
    both, _ = crowd(6, 41, demote_all_but=KEPT, host_pages=host_pages)
    seen: dict[str, int] = {}
    preempt = both.scheduler._preempt

    def watched(sequence: Sequence) -> None:
        seen[sequence.request.id] = sequence.demoted
        halves = sequence.halves
        preempt(sequence)
        assert sequence.halves == 0
        if halves and both.scheduler._memory.host is not None:
            assert sequence not in both.scheduler._memory.host._kept

    both.scheduler._preempt = watched
    answers = both.finish()
    assert any(seen.values())
    for name, demoted in seen.items():
        assert answers[name, 0].finish.demoted >= demoted


def test_a_page_that_others_share_may_lie_behind_a_demoted_one() -> None:
    """Two compute the same second page at once, so only the first's gets a name; the third page of
    the other gets one, and whoever comes next holds both."""
    both = pair(num_pages=20, slots=5, depth=0, policy=greedy(), demote_all_but=0)
    for prompts in ({"first": 4}, {"one": 8, "other": 12}, {"next": 12}):
        for name, length in prompts.items():
            both.add(request(name, [*range(length), ord(name[-1])], 9))
        both.step()
    _, one, other, last = both.scheduler._running
    assert last.pages[:3] == [*one.pages[:2], other.pages[2]]
    assert other.pages[1] not in one.pages
    memory = both.scheduler._memory
    memory.demote(other, 1)
    assert memory.pool.shared(other.pages) == 1
    both.add(request("late", [5], 4))
    plan = both.scheduler.plan(both.now)  # where it is forecast how long pages are held
    assert plan is not None
    assert len(plan.admits) == 1


class Told(Watermark):
    """A reserve that counts what it is told."""

    count = 0

    def evicted(self) -> None:
        self.count += 1


def test_the_reserve_hears_once_of_each_sequence_that_loses_pages() -> None:
    reserve = Told(0.0)
    both = pair(
        num_pages=57,
        slots=4,
        policy=replace(greedy(), reserve=reserve),
        demote_all_but=KEPT,
    )
    both.add(*(request(f"r{i}", [i] * 8, 60, seed=i, arrival=i) for i in range(4)))
    answers = both.finish()
    assert both.scheduler.load().preemptions == 0
    assert 0 < sum(answers[f"r{i}", 0].finish.demoted > 0 for i in range(4)) == reserve.count


def spare_capacity(decider: Decider, decision: Decision, first: int) -> int:
    """Pages that demoting everything of the one in need and of those behind would free."""
    losing = decision.running[first - 1 : decision.keep]
    count = sum(1 for _ in decider._demotable(decision, losing))
    found = min(count, decision.halves)
    return found + (count - found) // 2


def test_nobody_is_paused_while_demoting_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    retreat, pauses, demotions = Decider._retreat, 0, 0

    def watched(self: Decider, d: Decision, running: list[Sequence], first: int, need: int) -> None:
        nonlocal pauses, demotions
        short = need - d.free - d.promised
        could, keep, before = spare_capacity(self, d, first), d.keep, len(d.demotions)
        retreat(self, d, running, first, need)
        if short > 0 and could >= short:
            assert d.keep == keep, "somebody was paused although pages could be demoted"
            assert need <= d.free + d.promised
        losing = {sequence for sequence, _ in d.demotions.values()}
        assert not losing & set(d.running[d.keep :]), "demoted and paused at once"
        pauses += d.keep < keep
        demotions += len(d.demotions) > before

    monkeypatch.setattr(Decider, "_retreat", watched)
    for seed in range(60):
        rng = random.Random(seed)
        both, requests = anything(rng)
        todo = list(requests)
        while todo or both.scheduler.has_work():
            both.add(*todo[:3])
            del todo[:3]
            if rng.random() < 0.05:
                for output in both.scheduler.abort(rng.choice(requests).id, both.now):
                    both.outputs.append(replace_stop(output))
            both.step()
        assert both.scheduler.load().pages_held == 0
        assert both.scheduler._memory.pool.free_halves == 0
        assert_exact(gather(both.outputs), requests, both.worker.script)
    assert demotions > 500
    assert pauses > 10


def anything(rng: random.Random) -> tuple[Pair, list[Request]]:
    """A tight pool of any shape, and requests for it."""
    page_size = rng.choice([1, 2, 4])
    limit = rng.randrange(120, 140)
    both = pair(
        num_pages=1 + -(-limit // page_size) * rng.choice([4, 4, 5]) // 4,
        page_size=page_size,
        slots=rng.randint(2, 9),
        budget=rng.choice([16, 64]),
        max_len=limit,
        depth=rng.randrange(3),
        drafts=rng.choice([0, 0, 3]),
        policy=greedy(),
        host_pages=rng.choice([0, 0, 20]),
        enable_prefix_cache=rng.random() < 0.8,
        demote_all_but=rng.choice([0, KEPT]),
    )
    requests = [
        replace(item, tenant=rng.choice(["", "", "a"]), priority=rng.choice([0, 0, 1]))
        for item in workload(14, rng.getrandbits(30))
    ]
    return both, requests


def test_output_is_that_of_plain_decoding_whoever_shares_what() -> None:
    """The scripted worker reads halves as well as pages, and sees what was overwritten."""
    demoted = 0
    for depth in (0, 1, 2):
        for drafts in (0, 4):
            both = pair(
                num_pages=46,
                drafts=drafts,
                depth=depth,
                policy=greedy(),
                demote_all_but=KEPT,
                host_pages=20,
            )
            requests = workload(40, seed=depth)
            assert all(EOS in item.params.stop_token_ids for item in requests)
            run(both, requests)
            assert_exact(gather(both.outputs), requests, both.worker.script)
            demoted += both.scheduler.load().pages_demoted
    assert demoted > 50


def test_less_than_nothing_is_not_kept() -> None:
    with pytest.raises(ValueError, match="demote_all_but"):
        SchedulerConfig(num_pages=8, demote_all_but=-1)
