"""Pages in host memory: what is saved and loaded, when, and what becomes of it."""

from __future__ import annotations

import itertools
import random

import pytest

from scheduler.host_tier import HostTier
from scheduler.plan import PageCopy
from scheduler.policy import swap_pays
from scheduler.prefix import HashChain, Link
from scheduler.profile import Profile, StepShape, chunk_pairs
from scheduler.sequence import Sequence
from scheduler.step_cost import StepCost
from tests.fakes import KVCorruptedError, Script
from tests.scheduler.driving import Pair, assert_exact, gather, greedy, pair, request
from tests.scheduler.test_invariance import PAGES, run, workload


def crowded(host_pages: int = 1000, seed: int = 4, **config) -> Pair:
    """A pool far too small for the workload."""
    both = pair(num_pages=PAGES[4][0], policy=greedy(), host_pages=host_pages, **config)
    run(both, workload(24, seed))
    return both


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_swapping_does_not_show_in_the_text(page_size: int, depth: int) -> None:
    requests = workload(24, seed=page_size)
    out = back = 0
    for host_pages, shared, drafts in itertools.product((1, 1000), (True, False), (0, 4)):
        both = pair(
            num_pages=PAGES[page_size][0],
            page_size=page_size,
            drafts=drafts,
            depth=depth,
            policy=greedy(),
            script=Script(acceptance=0.5),
            host_pages=host_pages,
            enable_prefix_cache=shared,
        )
        run(both, requests)
        assert_exact(gather(both.outputs), requests, both.worker.script)
        out += both.scheduler.load().pages_swapped_out
        back += both.scheduler.load().pages_swapped_in
    assert out > 20
    assert back > 20


@pytest.mark.parametrize("shared", [True, False])
def test_resuming_from_host_memory_spares_most_of_the_recomputing(shared: bool) -> None:
    without = crowded(0, enable_prefix_cache=shared).scheduler.load()
    tiny = crowded(3, enable_prefix_cache=shared).scheduler.load()
    ample = crowded(enable_prefix_cache=shared).scheduler.load()
    assert without.pages_swapped_out == without.host_pages_total == 0
    assert without.preemptions > 10
    assert ample.recomputed_tokens < tiny.recomputed_tokens
    assert ample.recomputed_tokens / ample.preemptions < 8, "a part of a page, and what was running"
    assert ample.recomputed_tokens < 0.4 * without.recomputed_tokens


def test_without_host_pages_plans_are_as_ever() -> None:
    both = crowded(0)
    assert both.scheduler.load().preemptions > 10
    assert all(plan.saves == () for plan in both.worker.plans)
    assert all(admit.loads == () for plan in both.worker.plans for admit in plan.admits)


def test_pages_that_stay_on_the_device_are_not_copied() -> None:
    """Three end soon after the fourth had to go: its pages are all still there."""
    both = pair(num_pages=38, slots=4, policy=greedy(), host_pages=100)
    lengths = [5, 5, 5, 16]
    both.add(*(request(f"r{i}", range(i, i + 33), lengths[i], seed=i, arrival=i) for i in range(4)))
    both.finish()
    assert both.scheduler.load().preemptions == 1
    assert both.scheduler.load().pages_swapped_out <= 3, "of more than 8"


def paused(host_pages: int = 100, n: int = 1, depth: int = 1) -> tuple[Pair, str]:
    """The sequences of the last request have been paused, and their pages overwritten."""
    both = pair(num_pages=41, slots=6, policy=greedy(), host_pages=host_pages, depth=depth)
    both.add(request("old", range(60), 80, seed=1, arrival=0.0))
    both.add(request("new", range(20, 50), 60, seed=2, arrival=1.0, n=n))
    while both.scheduler.load().waiting < n or not both.scheduler.load().pages_swapped_out:
        both.step()
        assert both.now < 100
    return both, "new"


def test_what_is_kept_is_let_go_when_the_sequence_ends_while_it_waits() -> None:
    both, name = paused()
    assert both.scheduler.load().host_pages_held > 0
    both.abort(name)
    while both.in_flight:
        both.settle()
    assert both.scheduler.load().host_pages_held == 0
    both.finish()


def test_a_loaded_page_is_held_until_its_step_has_settled() -> None:
    both, _ = paused(depth=2)
    loads: tuple[PageCopy, ...] = ()
    while not loads:
        plan = both.step()
        loads = tuple(load for admit in plan.admits for load in admit.loads) if plan else ()
        assert both.now < 100
    assert both.scheduler.load().host_pages_held >= len(loads)
    assert both.scheduler.load().pages_swapped_in == len(loads)
    while both.in_flight:
        both.settle()
    assert both.scheduler.load().host_pages_held == 0
    both.finish()


def test_another_request_finds_what_a_paused_one_left_in_host_memory() -> None:
    both, _ = paused()
    both.finish()
    # Everything cached on the device goes; of the host's pages nobody is kept any more.
    both.add(request("flood", [49] * 100, 58, seed=9, arrival=both.now))
    both.finish()
    before = both.scheduler.load()
    assert before.pages_swapped_out > 11, "the beginning followed the end"
    again = request("again", range(20, 50), 3, seed=8, arrival=both.now)
    both.add(again)
    answers = both.finish()
    after = both.scheduler.load()
    assert after.pages_swapped_in > before.pages_swapped_in
    assert answers["again", 0].finish.cached_tokens == 28
    expected, _ = both.worker.script.answer(again)
    assert tuple(answers["again", 0].tokens) == expected


def test_choices_of_one_request_load_their_prompt_once() -> None:
    both, _ = paused(n=3)
    while both.scheduler.load().running < 3:
        both.step()
    *_, first, second, third = (a for plan in both.worker.plans for a in plan.admits)
    assert {load.target for load in first.loads} & set(first.pages[:7]), "of the prompt's pages"
    assert first.pages[:7] == second.pages[:7] == third.pages[:7]
    both.finish()


def test_saves_come_in_the_plan_that_gives_the_page_away() -> None:
    for depth in (0, 1, 2, 3):
        both = crowded(depth=depth, drafts=2)
        for plan in both.worker.plans:
            taken = {page for row in plan.rows for page in row.new_pages}
            taken |= {load.target for admit in plan.admits for load in admit.loads}
            assert {save.source for save in plan.saves} <= taken


def test_the_worker_notices_a_save_that_comes_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: saves that are carried out after the rows keep somebody else's page."""
    from tests import fakes

    launch = fakes.ScriptedWorker.execute

    def late(self, plan):
        saves = plan.saves
        result = launch(self, type(plan)(plan.step, plan.admits, plan.rows))
        fakes._copy(self._kv, self._host, saves)
        return result

    monkeypatch.setattr(fakes.ScriptedWorker, "execute", late)
    with pytest.raises(KVCorruptedError):
        crowded()


POINTS = tuple(
    (StepShape(1, tokens, 0, chunk_pairs(tokens, 0)), 0.001 + tokens * 1e-4)
    for tokens in (1, 10, 100)
)


@pytest.mark.parametrize(("page_seconds", "swaps"), [(1e-4, True), (1e-2, False)])
def test_what_is_cheaper_is_done(page_seconds: float, swaps: bool) -> None:
    """A page of 4 tokens is computed in 0.4 ms; two copies take 0.2 or 20."""
    cost = StepCost.from_profile(Profile(POINTS, copies=((1, page_seconds), (9, 9 * page_seconds))))
    both = pair(num_pages=PAGES[4][0], policy=greedy(), host_pages=1000)
    both.scheduler.cost = cost
    run(both, workload(24, seed=4))
    load = both.scheduler.load()
    assert load.preemptions > 10
    assert bool(load.pages_swapped_out) is bool(load.pages_swapped_in) is swaps


def test_without_a_profile_swapping_is_taken_to_pay() -> None:
    assert swap_pays(StepCost.learning(), 100, 16)
    assert swap_pays(StepCost.from_profile(Profile(POINTS)), 100, 16)


def test_steps_with_copies_teach_nothing_about_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[StepShape] = []
    monkeypatch.setattr(StepCost, "observe", lambda self, shape, seconds: seen.append(shape))
    plans = crowded().worker.plans
    assert seen == [plan.shape for plan in plans if not plan.copies]
    assert len(seen) < len(plans)


def links(count: int, first: int = 0) -> list[Link]:
    chain, tokens = HashChain(b"", 1), [first, *range(100, 100 + count)]
    return [chain.link(i, tokens) for i in range(count)]


def sequences(count: int) -> list[Sequence]:
    scheduler = pair().scheduler
    for i in range(count):
        scheduler.add(request(f"s{i}", [1, 2, 3]), 0.0)
    return list(scheduler._waiting)


def test_room_is_promised_once() -> None:
    tier = HostTier(3)
    a, b = sequences(2)
    first, second = links(2, first=1), links(3, first=2)
    tier.keep(a, first)
    tier.keep(b, second)  # room for one page is left
    for i, link in enumerate([*second, *first]):
        tier.evicted(i + 1, link)
    saves = tier.take_saves()
    assert [save.source for save in saves] == [1, 4, 5]
    assert sorted(save.target for save in saves) == [1, 2, 3]
    tier.check([a, b])
    tier.release(a, None)
    tier.check([b])
    assert tier.held == 1


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_operations_keeps_the_books(seed: int) -> None:
    """Against a model that is a dict of sets: what is kept and was saved can be loaded."""
    rng = random.Random(seed)
    tier = HostTier(6)
    everyone = sequences(5)
    chains = [links(6, first=i // 2) for i in range(5)]
    content: dict[int, Link] = {}  # host page -> what was copied to it
    safe: dict[Sequence, set[Link]] = {}  # kept, and in host memory
    steps: list[int] = []
    for step in range(400):
        action = rng.choice(["keep", "release", "evict", "load", "settle"])
        waiting = [s for s in everyone if s in safe]
        if action == "keep" and len(waiting) < len(everyone):
            i = rng.choice([i for i, s in enumerate(everyone) if s not in safe])
            tier.keep(everyone[i], chains[i][: rng.randint(0, 6)])
            safe[everyone[i]] = {link for link in tier._kept[everyone[i]] if tier.find(link)}
        elif action == "release" and waiting:
            gone = rng.choice(waiting)
            tier.release(gone, steps[-1] if steps else None)
            del safe[gone]
        elif action == "evict":
            link = rng.choice(rng.choice(chains))
            tier.evicted(step + 1, link)
            for save in tier.take_saves():
                assert save.source == step + 1
                content[save.target] = link
                for keeper in waiting:
                    if link in tier._kept[keeper]:
                        safe[keeper].add(link)
        elif action == "load":
            found = [page for page in map(tier.find, rng.choice(chains)) if page is not None]
            tier.pin(found)
            steps.append(step)
            tier.loaded(found, step)
        elif steps:
            tier.lift(steps.pop(0))
        for link in {link for links in safe.values() for link in links}:
            page = tier.find(link)
            assert page is not None, "a kept page was overwritten"
            assert content[page] == link
        tier.check(list(safe))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_both_tiers_account_for_every_page_over_many_operations(shared: bool, seed: int) -> None:
    """10^5 additions, aborts, plans and settled steps; `Scheduler.check` runs after each."""
    rng = random.Random(seed)
    operations = 0
    preemptions = out = back = 0
    while operations < 10_000:
        page_size = rng.choice([1, 2, 4, 8])
        both = pair(
            num_pages=1 + 64 * rng.randint(1, 2) // page_size,
            page_size=page_size,
            slots=rng.randint(4, 8),
            budget=rng.randint(8, 48),
            max_len=60,
            depth=rng.randint(0, 3),
            drafts=rng.choice([0, 0, 1, 4]),
            policy=greedy(),
            script=Script(acceptance=0.5),
            host_pages=rng.choice([1, 4, 16, 64, 256]),
            enable_prefix_cache=shared,
        )
        items = []
        stem = [rng.randrange(50) for _ in range(30)]
        for i in range(150):
            prompt = stem[: rng.randrange(30)] + [rng.randrange(50) for _ in range(5)]
            items.append(
                request(
                    f"r{i}",
                    prompt,
                    rng.randint(1, 20),
                    seed=i,
                    arrival=float(i),
                    n=rng.choice([1, 1, 1, 2]),
                    priority=rng.choice([0, 0, 0, -1]),
                )
            )
        todo = list(items)
        while todo or both.scheduler.has_work():
            if todo and rng.random() < 0.5:
                both.add(todo.pop())
                operations += 1
            if rng.random() < 0.05:
                both.abort(rng.choice(items).id)
                operations += 1
            if rng.random() < 0.1 and both.in_flight:
                both.settle()
                operations += 1
            operations += 1 + (both.step() is not None)
        assert_exact(gather(both.outputs), items, both.worker.script)
        load = both.scheduler.load()
        assert load.pages_held == load.host_pages_held == 0
        preemptions += load.preemptions
        out += load.pages_swapped_out
        back += load.pages_swapped_in
    assert preemptions > 30, "or nothing was tried"
    assert out > 10
    assert back > 10


def test_the_check_sees_a_page_that_nobody_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: pages that stay held after the sequence has resumed."""
    monkeypatch.setattr(HostTier, "release", lambda self, sequence, fence: None)
    with pytest.raises(AssertionError):
        crowded()
