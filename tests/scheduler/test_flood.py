"""A tenant that floods the server, and what another one sees of it. On a simulated clock."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from scheduler.fair_share import Account
from scheduler.request import Request, SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.spare import STEP_PART, Room, Spare
from scheduler.waiting import WaitingQueue
from tests.scheduler.clocked import Clocked
from tests.scheduler.driving import request
from tests.scheduler.test_gap import profiled, seconds

SECONDS = 40.0
CASES = {  # pages, slots, and the flood's mean output; its prompts have 300 tokens on average
    "slots": (6000, 64, 200),
    "few slots": (2000, 16, 200),
    "pages": (1200, 64, 200),
    "pages, long outputs": (2000, 64, 1000),
}


def some(
    tenant: str, count: int, rate: float, output: int, prompts=(150, 450), **fields
) -> list[Request]:
    """Requests at random times; all at once where the rate is 0. `prompts`: their least and largest
    length."""
    rng, now, requests = random.Random(tenant), 0.0, []
    for i in range(count):
        now += rng.expovariate(rate) if rate else 0.0
        first = (i * 2 + (tenant == "flood")) * 1000
        prompt = range(first, first + rng.randint(*prompts))
        tokens = rng.randint(output // 2, output * 3 // 2)
        requests.append(
            request(f"{tenant}{i}", prompt, tokens, arrival=now, tenant=tenant, **fields)
        )
    return requests


def run(case: str, *requests: list[Request], **fields) -> Clocked:
    pages, slots, _ = CASES[case]
    config = SchedulerConfig(
        num_pages=pages, max_num_seqs=slots, max_model_len=9000, max_queued_requests=10**5, **fields
    )
    clocked = Clocked(Scheduler(config, cost=profiled()), seconds)
    clocked.run([item for group in requests for item in group], until=SECONDS)
    clocked.scheduler.check()
    return clocked


def p95(clocked: Clocked, requests: list[Request]) -> float:
    times = sorted(clocked.ttft(item.id) for item in requests if clocked.times[item.id, 0])
    assert len(times) > 0.9 * len([item for item in requests if item.arrival < SECONDS - 2])
    return times[int(0.95 * len(times))]


def tokens(clocked: Clocked) -> int:
    return sum(len(times) for (name, _), times in clocked.times.items() if "flood" in name)


@pytest.mark.parametrize("case", CASES)
def test_a_flood_leaves_the_first_token_of_another_tenant_within_twice_the_time(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modest = some("modest", 50, 1.0, 100)
    flood = some("flood", 2000, 0.0, CASES[case][2], priority=-5)
    alone = p95(run(case, modest), modest)
    flooded = run(case, modest, flood)
    assert p95(flooded, modest) <= 2 * alone
    # Negative control: with turns alone, the other waits for an end.
    monkeypatch.setattr(Spare, "beside", lambda self, account, pages: (0, 0))
    turns = run(case, modest, flood)
    assert p95(turns, modest) > 2.2 * alone
    assert tokens(flooded) > 0.85 * tokens(turns), "what is left free costs little"


def test_one_tenant_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    flood = some("flood", 300, 0.0, 50)
    monkeypatch.setattr("scheduler.decide.Spare", None)  # it is never made
    clocked = run("few slots", flood)
    assert max(len(plan.rows) for plan, _ in clocked.steps) == 16


def test_equals_share_all_slots() -> None:
    """Nothing is left free between tenants that all have at most their share."""
    clocked = run("few slots", some("a", 300, 0.0, 50), some("b", 300, 0.0, 50))
    rows = [len(plan.rows) for plan, _ in clocked.steps[20:-200]]
    assert sum(rows) / len(rows) > 15


def accounts(**served: int) -> list[Account]:
    waiting = Scheduler(SchedulerConfig(num_pages=321))._waiting
    made = [waiting.open(name, 1, 0.0) for name in served]
    for account, tokens in zip(made, served.values(), strict=True):
        account.served = tokens
    return made


def test_room_is_left_by_those_over_their_share_alone() -> None:
    much, little = both = accounts(much=5, little=5)
    spare = Spare(Room(slots=32, pages=320, tokens=256, much=100), both, [])
    assert spare.beside(much, 300) == (0, 0), "who has nothing may take anything"
    for _ in range(15):
        spare.admit(much, 1)
    assert spare.beside(much, 1) == (0, 0)
    spare.admit(much, 1)
    assert spare.beside(much, 1) == (2, 20), "more than half of the slots"
    assert spare.beside(little, 1) == (0, 0)
    spare.admit(little, 155)
    assert spare.beside(little, 5) == (0, 0)
    assert spare.beside(little, 6) == (2, 20), "more than half of the pages"


def test_no_room_is_left_to_somebody_far_ahead() -> None:
    behind, ahead = both = accounts(behind=5, ahead=106)
    spare = Spare(Room(slots=2, pages=320, tokens=256, much=100), both, [])
    spare.admit(behind, 1)
    assert spare.beside(behind, 1) == (0, 0)
    behind.served += 1
    assert spare.beside(behind, 1) == (2, 20)
    spare.admit(ahead, 1)
    assert spare.beside(ahead, 1) == (2, 20)


def test_a_part_of_a_step_is_for_the_prompts_of_one_tenant() -> None:
    flood, modest = some("flood", 100, 0.0, 50), some("modest", 1, 0.0, 2000)
    clocked = run("slots", modest, flood)
    prompts = [sum(len(row.chunk) for row in plan.rows if row.chunk) for plan, _ in clocked.steps]
    limit = clocked.scheduler.config.max_step_tokens // STEP_PART
    assert max(prompts[2:]) == limit  # before that, the modest tenant's prompt is there as well
    assert prompts.count(limit) > 20
    ahead, behind = both = accounts(ahead=8, behind=7)
    spare = Spare(Room(slots=32, pages=320, tokens=256, much=100), both, [])
    spare.feed(ahead, 50)
    assert (spare.room(ahead, 200), spare.room(ahead, 5), spare.room(behind, 200)) == (14, 5, 200)
    spare.feed(ahead, 14)
    assert spare.room(ahead, 200) == 0


def test_the_charge_for_a_prompt_does_not_slow_it_down() -> None:
    """Who comes back is lifted to what the flood was served, and its prompt is charged when it is
    let in. For that alone it is not ahead of the flood; whose prompts stay small meanwhile."""
    flood, modest = some("flood", 2000, 0.0, 200), some("modest", 1, 0.0, 100)
    long = request("long", range(4000), 5, arrival=20.0, tenant="modest")
    clocked = run("slots", modest, flood, [long])
    budget = clocked.scheduler.config.max_step_tokens
    sizes = [[len(row.chunk) for row in plan.rows if row.chunk] for plan, _ in clocked.steps]
    own = [max(chunks) for chunks in sizes if chunks and max(chunks) > budget // STEP_PART]
    assert sum(own) >= 4000 - 2 * budget // STEP_PART
    beside = [sum(chunks) - max(chunks) for chunks in sizes if chunks and max(chunks) in own]
    assert max(beside[1:]) <= budget // STEP_PART


def chunks(clocked: Clocked) -> list[dict[str, list[tuple[int, bool]]]]:
    """By step and tenant: the sizes of chunks, and whether they end their prompts."""
    steps = []
    for plan, _ in clocked.steps:
        sizes: dict[str, list[tuple[int, bool]]] = {"flood": [], "modest": []}
        for row in plan.rows:
            if row.chunk:  # see `some`
                tenant = "flood" if row.chunk[0] // 1000 % 2 else "modest"
                sizes[tenant].append((len(row.chunk), row.samples))
        steps.append(sizes)
    return steps


def test_requests_at_once_count_against_a_tenant_only_beyond_its_credit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It asks for less than its share. The charge for one prompt does not have it count as ahead of
    the flood when the next one's turn comes, and have it read in parts."""
    modest = [replace(r, arrival=float(int(r.arrival))) for r in some("modest", 100, 4.0, 20)]
    flood = some("flood", 2000, 0.0, 200)
    credited = run("slots", modest, flood, max_step_tokens=256)
    monkeypatch.setattr("scheduler.scheduler.WaitingQueue", lambda credit: WaitingQueue())
    lifted = run("slots", modest, flood, max_step_tokens=256)
    assert p95(credited, modest) < 0.8 * p95(lifted, modest)
    assert tokens(credited) > 0.95 * tokens(lifted), "its prompts keep to their part of steps"


def test_the_step_that_ends_a_prompt_has_none_of_the_flood() -> None:
    modest, flood = some("modest", 100, 4.0, 20), some("flood", 2000, 0.0, 200)
    steps = chunks(run("slots", modest, flood))[20:]
    ending = [step for step in steps if any(ends for _, ends in step["modest"])]
    assert len(ending) > 80
    assert not any(step["flood"] for step in ending)
    # A step that only goes on with one has some of the flood's, and so has the one after its end.
    assert sum(bool(step["flood"]) for step in steps) > 100


def test_what_a_chunk_may_have_stays_so_for_a_step() -> None:
    """A long chunk that was let in is widened to what is left, never cut off."""
    one, _ = both = accounts(one=5, other=5)
    spare = Spare(Room(slots=4, pages=320, tokens=256, much=100), both, [])
    before = spare.room(one, 200)
    for _ in range(4):
        spare.admit(one, 80)
        spare.feed(one, 100)
    assert spare.room(one, 200) == before == 200


def test_a_tenant_counts_as_about_for_a_while() -> None:
    waiting = Scheduler(SchedulerConfig(num_pages=10))._waiting
    waiting.open("stays", 1, 0.0)
    shares, gone = waiting._shares, waiting.open("goes", 1, 0.0)
    shares.close(gone, 10.0)
    assert len(waiting.tenants(300.0)) == 2
    assert len(waiting.tenants(311.0)) == 1
