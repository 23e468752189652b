"""The admission test inside the real scheduler: what the forecast promises, happens."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from scheduler.admission import AdaptiveReserve, Policy, make_policy
from scheduler.lengths import LengthWindow, NothingMore, PastFuture
from scheduler.request import Request
from tests.fakes import Script
from tests.scheduler.driving import EOS, Pair, pair, request


def requests(seed: int, count: int = 30, *, shared: bool = False) -> list[Request]:
    rng = random.Random(seed)
    prefixes = [[rng.randrange(40) for _ in range(24)] for _ in range(2)]
    made = []
    for i in range(count):
        prefix = rng.choice(prefixes)[: rng.randrange(25)] if shared else []
        tail = [rng.randrange(40) for _ in range(rng.randint(1, 12))]
        made.append(
            request(f"r{i}", prefix + tail, rng.randint(1, 40), seed=i, arrival=i, stop=[EOS])
        )
    return made


def truth_of(requests: list[Request], script: Script) -> dict[str, int]:
    return {r.id: len(script.answer(r, 0)[0]) for r in requests}


def serve(both: Pair, requests: list[Request], watch: Callable[[], None] | None = None) -> None:
    todo = list(requests)
    while todo or both.scheduler.has_work():
        both.add(*todo[:2])
        del todo[:2]
        both.step()
        if watch:
            watch()


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("shared", [False, True])
def test_with_true_lengths_nothing_is_ever_evicted(
    page_size: int, depth: int, shared: bool
) -> None:
    """And not for want of pressure: others, who do not know, evict on the same pool."""
    evicted = 0
    for seed in range(12):
        todo, script = requests(seed, shared=shared), Script()
        for policy in (
            make_policy("oracle", truth=truth_of(todo, script)),
            make_policy("conservative"),
            make_policy("aggressive", watermark=0.0),
        ):
            both = pair(
                num_pages=1 + -(-110 // page_size),
                page_size=page_size,
                depth=depth,
                policy=policy,
                script=script,
                lookahead=seed % 3,
            )
            serve(both, todo)
            preemptions = both.scheduler.load().preemptions
            if isinstance(policy.lengths, NothingMore):
                evicted += preemptions
            else:
                assert preemptions == 0, (seed, policy)
    assert evicted > 12


@pytest.mark.parametrize("shared", [False, True])
def test_a_forecast_under_true_lengths_comes_true(shared: bool) -> None:
    """With nobody admitted any more, the most pages ever held are what was forecast; pages of a
    prefix that some hold already and others join count once."""
    for seed in range(20):
        todo, script = requests(seed, 12, shared=shared), Script()
        both = pair(
            num_pages=200,
            page_size=4,
            slots=12,
            budget=400,
            policy=make_policy("oracle", truth=truth_of(todo, script)),
            script=script,
        )
        both.add(*todo[:3])
        both.step()
        both.add(*todo[3:])
        both.step()
        forecast = both.scheduler.load().pages_forecast
        most = 0
        while both.scheduler.has_work():
            most = max(most, both.scheduler.load().pages_held)
            both.step()
        assert most <= forecast <= most + 6


def test_the_reserve_settles_where_evictions_meet_the_target() -> None:
    rng = random.Random(0)
    reserve = AdaptiveReserve(target=0.05)
    evictions = 0
    for i in range(20_000):
        # The wider the reserve, the rarer an eviction: one in ten at 5 %, one in 20 at 10 %.
        if rng.random() < 0.005 / max(reserve.share(16), 0.01):
            reserve.evicted()
            evictions += i >= 10_000
        reserve.finished()
    assert evictions / 10_000 == pytest.approx(0.05, rel=0.2)
    assert reserve.share(16) == pytest.approx(0.1, rel=0.5)


def test_a_warm_window_fills_the_pool_that_doubt_leaves_empty() -> None:
    """Answers end long before their limit: once that is known, more of them run at a time."""
    running = []
    for past in ([], [8] * 200):
        window = LengthWindow()
        for length in past:
            window.add(length, cut_short=False)
        both = pair(
            num_pages=60,
            slots=40,
            budget=200,
            policy=Policy(PastFuture(window), AdaptiveReserve()),
        )
        both.add(*(request(f"r{i}", [i] * 4, 100, arrival=i, stop=[EOS]) for i in range(40)))
        both.step()
        running.append(both.scheduler.load().running)
    cold, warm = running
    assert cold == 1  # of the 59 pages, 26 each, and a reserve
    assert warm >= 10  # 4 pages each, but for the few that doubt lets grow, and a reserve


def test_a_policy_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown policy 'greedy'"):
        make_policy("greedy")
    with pytest.raises(ValueError, match="simulation only"):
        make_policy("oracle")
    with pytest.raises(ValueError, match="watermark"):
        make_policy("aggressive", watermark=1.0)
