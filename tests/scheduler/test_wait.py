"""Predicted waits against the waits that follow, and refusals at arrival."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import numpy as np
import pytest

from benchmarks.scheduling_policies import SERVED, TARGETS, play
from scheduler.admission import make_policy
from scheduler.gate import KNOWN_ENDS, MAX_RETRY_AFTER, MIN_RETRY_AFTER, Overloaded
from scheduler.plan import RowResult, StepPlan
from scheduler.profile import StepShape
from scheduler.request import Refusal, Request, SamplingParams, SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.sequence import WaitForecast
from scheduler.step_cost import StepCost
from scheduler.wait import Releases, Waits
from scheduler.workloads import WORKLOADS
from tests.scheduler.clocked import NONE, Clocked
from tests.scheduler.driving import pair, request

END = 1  # the stop token; every other token is 2
LIMIT = 1900


def seconds(shape: StepShape) -> float:
    """About those of an 8B model on a large GPU."""
    return 0.008 + 4e-5 * shape.tokens + 2e-8 * shape.decode_context + 1e-9 * shape.chunk_pairs


class Lengthy(Clocked):
    """Answers have lengths of their own; refused requests are noted, or come back as told."""

    def __init__(self, *, retries: bool = False, policy: str = "past-future", **config) -> None:
        known = {"page_size": 16, "max_step_tokens": 512, "max_model_len": 4096}
        limits = SchedulerConfig(**{**known, **config})
        super().__init__(Scheduler(limits, policy=make_policy(policy)), seconds)
        self.lengths: list[int] = []  # by seed, which tells requests apart
        self.refused: list[tuple[Request, float, Overloaded]] = []
        self.back: list[tuple[float, Request]] = []
        self._retries = retries
        self._slots: dict[int, list[int]] = {}  # known tokens, of the prompt, seed

    def make(self, prompt: Iterable[int], length: int, arrival: float, **fields) -> Request:
        """A request whose answer has `length` tokens, the end token included."""
        self.lengths.append(length)
        seed = len(self.lengths) - 1
        params = SamplingParams(max_tokens=LIMIT, seed=seed, stop_token_ids=frozenset([END]))
        return Request(f"r{seed}", tuple(prompt), params, arrival, **fields)

    def run(self, requests: Iterable[Request], until: float = float("inf")) -> None:
        super().run(requests, until)
        while self.back:
            again = [Request(**{**_fields(r), "arrival": at}) for at, r in self.back]
            self.back.clear()
            super().run(again)

    def _arrive(self, request: Request) -> None:
        try:
            super()._arrive(request)
        except Overloaded as error:
            self.refused.append((request, self.now, error))
            if self._retries:
                self.back.append((self.now + error.retry_after, request))

    def _rows(self, plan: StepPlan) -> tuple[RowResult, ...]:
        for admit in plan.admits:
            self._slots[admit.slot] = [len(admit.cached), admit.prompt_len, admit.params.seed]
        rows = []
        for row in plan.rows:
            slot = self._slots[row.slot]
            slot[0] += len(row.chunk or ()) + row.samples
            ended = slot[0] - slot[1] >= self.lengths[slot[2]]
            done = RowResult(tokens=(END if ended else 2,))
            rows.append(done if row.samples else NONE)
        return tuple(rows)


def _fields(request: Request) -> dict:
    return {name: getattr(request, name) for name in Request.__slots__}


def chat(rng: random.Random) -> tuple[int, int]:
    return rng.randint(20, 600), min(LIMIT, 1 + int(rng.lognormvariate(4.6, 0.9)))


def decode_heavy(rng: random.Random) -> tuple[int, int]:
    return rng.randint(20, 200), min(LIMIT, 1 + int(rng.lognormvariate(5.6, 0.6)))


def prefill_heavy(rng: random.Random) -> tuple[int, int]:
    return rng.randint(500, 2000), 1 + int(rng.expovariate(1 / 20))


def equal(rng: random.Random) -> tuple[int, int]:
    return 100, 120


def load(driver: Lengthy, kind, count: int, rate: float, seed: int, burst: int = 1, **fields):
    """Poisson arrivals, `burst` at a time."""
    rng, at = random.Random(seed), 0.0
    requests = []
    for i in range(count):
        if i % burst == 0:
            at += rng.expovariate(rate / burst)
        prompt, length = kind(rng)
        requests.append(
            driver.make((rng.randrange(3, 50) for _ in range(prompt)), length, at, **fields)
        )
    return requests


LOADS = [
    (chat, {"num_pages": 4000, "max_num_seqs": 16}, 12.0, 1),  # slots are short
    (chat, {"num_pages": 300, "max_num_seqs": 64}, 12.0, 1),  # memory is short
    (chat, {"num_pages": 4000, "max_num_seqs": 16}, 7.0, 40),  # bursts
    (decode_heavy, {"num_pages": 500, "max_num_seqs": 64}, 9.0, 1),
    (decode_heavy, {"num_pages": 500, "max_num_seqs": 64}, 5.0, 1),  # at the edge of overload
    (prefill_heavy, {"num_pages": 4000, "max_num_seqs": 64}, 16.0, 1),  # the budget is short
    (equal, {"num_pages": 4000, "max_num_seqs": 16}, 14.0, 1),
]


def test_first_tokens_come_about_when_predicted() -> None:
    """From the first prediction after a cold start on: within a factor of two for four in five of
    those that had to wait, and for no load worse than within two or a second for two in three. At
    the edge of overload who waits, and how long, hangs on single guesses of length."""
    ratios: list[float] = []
    for kind, limits, rate, burst in LOADS:
        driver = Lengthy(**limits)
        driver.run(load(driver, kind, 220, rate, 1, burst))
        waits = [
            (end.first_token - end.arrival, end.predicted_first_token - end.arrival)
            for end in driver.ends.values()
            if end.predicted_first_token is not None
        ]
        good = sum(abs(a - p) < 1.0 or 0.5 <= a / p <= 2.0 for a, p in waits) / len(waits)
        assert good >= 0.66, (kind.__name__, limits, good)
        ratios += [a / p for a, p in waits]
    good = sum(0.5 <= ratio <= 2.0 for ratio in ratios) / len(ratios)
    assert good >= 0.8, good


def test_an_idle_server_predicts_no_wait_and_refuses_nothing() -> None:
    driver = Lengthy(num_pages=400, max_num_seqs=4, ttft_target=1e-6, max_queued_tokens=1)
    requests = load(driver, chat, 40, 0.2, 3)
    driver.run(requests)
    assert driver.refused == []
    assert all(end.predicted_first_token is None for end in driver.ends.values())
    forecast = driver.scheduler.predicted_wait(requests[0], driver.now)
    assert forecast is not None
    assert forecast.admission_s == 0.0
    assert driver.scheduler.load().predicted_wait == 0.0


def test_a_cold_start_refuses_nothing_by_its_targets() -> None:
    driver = Lengthy(num_pages=400, max_num_seqs=2, ttft_target=1e-3)
    cold = load(driver, equal, 40, 1e6, 1)
    driver.run(cold, until=0.01)
    assert driver.refused == []
    assert driver.scheduler.predicted_wait(cold[0], driver.now) is None
    driver.run([])
    assert len(driver.ends) == 40 > KNOWN_ENDS


def warm(**limits) -> Lengthy:
    """A driver that has learnt, with a queue in front of it."""
    driver = Lengthy(**{"num_pages": 400, "max_num_seqs": 4, **limits})
    driver.run(load(driver, equal, 40, 2.0, 1))
    start = driver.now
    for item in load(driver, equal, 20, 1e9, 2):
        moved = {**_fields(item), "arrival": start, "ttft_target": 1e6}
        driver.scheduler.add(Request(**moved), start)
    return driver


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"ttft_target": 0.5}, Refusal.TTFT),
        ({"deadline": 0.6}, Refusal.DEADLINE),
        ({"queue_deadline": 0.5}, Refusal.DEADLINE),
        ({"ttft_target": 60.0}, None),
        ({"deadline": 60.0, "queue_deadline": 60.0}, None),
    ],
)
def test_who_would_wait_in_vain_is_refused(fields: dict, reason: Refusal | None) -> None:
    driver = warm()
    now = driver.now
    moved = {name: v if "target" in name else now + v for name, v in fields.items()}
    late = driver.make(range(3, 50), 20, now, **moved)
    forecast = driver.scheduler.predicted_wait(late, now)
    assert forecast is not None
    assert forecast.first_token_s > forecast.admission_s > 2.0
    if reason is None:
        driver.scheduler.add(late, now)
        return
    with pytest.raises(Overloaded, match="about") as refused:
        driver.scheduler.add(late, now)
    assert refused.value.reason is reason
    over = forecast.first_token_s - 0.6
    assert MIN_RETRY_AFTER <= over * 0.8 <= refused.value.retry_after <= 1.5 * over + 1.0
    driver.run([])
    again = driver.make(range(3, 50), 20, driver.now, **moved)
    if "target" in next(iter(fields)):
        driver.scheduler.add(again, driver.now)  # the queue is empty now
        assert driver.scheduler.load().waiting == 1


def test_the_servers_target_counts_for_requests_without_their_own() -> None:
    driver = warm(ttft_target=2.0)
    strict = driver.make(range(3, 50), 20, driver.now)
    patient = driver.make(range(3, 50), 20, driver.now, ttft_target=500.0)
    driver.scheduler.add(patient, driver.now)
    with pytest.raises(Overloaded) as refused:
        driver.scheduler.add(strict, driver.now)
    assert refused.value.reason is Refusal.TTFT


def test_those_refused_at_once_are_not_told_to_come_back_at_once() -> None:
    driver = warm(max_queued_requests=20)
    told = []
    for _ in range(100):
        with pytest.raises(Overloaded) as refused:
            driver.scheduler.add(driver.make([5], 20, driver.now), driver.now)
        assert refused.value.reason is Refusal.QUEUE_FULL
        told.append(refused.value.retry_after)
    assert told == sorted(told)
    assert told[-1] > 4 * told[0]
    assert told[0] >= MIN_RETRY_AFTER
    assert told[-1] <= MAX_RETRY_AFTER


def test_clients_that_come_back_when_told_are_served() -> None:
    driver = Lengthy(num_pages=400, max_num_seqs=8, max_queued_tokens=2000, retries=True)
    requests = load(driver, equal, 200, 60.0, 1)
    driver.run(requests)
    assert {name for name, _ in driver.ends} == {item.id for item in requests}
    assert {error.reason for _, _, error in driver.refused} == {Refusal.QUEUE_TOKENS}
    tries = len(driver.refused) / len(requests)
    assert 0.2 < tries < 4.0, tries


def test_fair_share_shortens_the_wait_of_who_asks_little() -> None:
    driver = Lengthy(num_pages=400, max_num_seqs=4)
    driver.run(load(driver, equal, 40, 2.0, 1, tenant="big"))
    start = driver.now
    for item in load(driver, equal, 30, 1e9, 2, tenant="big"):
        driver.scheduler.add(Request(**{**_fields(item), "arrival": start}), start)
    waits = {
        tenant: driver.scheduler.predicted_wait(
            driver.make(range(3, 50), 20, start, tenant=tenant), start
        )
        for tenant in ("big", "small")
    }
    assert waits["small"].admission_s < 0.5 * waits["big"].admission_s
    urgent = driver.make(range(3, 50), 20, start, tenant="big", priority=-1)
    assert driver.scheduler.predicted_wait(urgent, start).admission_s < 0.5 * (
        waits["big"].admission_s
    )


def test_what_is_given_back_is_handed_out_again() -> None:
    alone = Releases(0.0, [(10.0, 1.0), (20.0, 1.0)])
    assert alone.steps_until(1.0, 1e9) == pytest.approx(10.0)
    assert alone.steps_until(2.0, 1e9) == pytest.approx(20.0)
    # From 20 on there are two, each given back every five steps.
    assert alone.steps_until(4.0, 5.0) <= alone.steps_until(6.0, 5.0)
    assert alone.steps_until(102.0, 5.0) - alone.steps_until(62.0, 5.0) == pytest.approx(100.0)
    free = Releases(3.0, [])
    assert free.steps_until(3.0, 5.0) == 0.0
    assert free.steps_until(6.0, 5.0) == pytest.approx(5.0)
    assert Releases(0.0, []).steps_until(1.0, 5.0) == float("inf")
    assert Releases(-1.0, [(4.0, 1.5), (9.0, 1.0)]).steps_until(1.0, 1e9) == pytest.approx(9.0)


def test_sums_of_the_queue_stay_right() -> None:
    """`check`, which compares them with the queue, runs after every step."""
    rng = random.Random(5)
    both = pair(slots=2, num_pages=40)
    for i in range(60):
        prompt = [rng.randrange(20) for _ in range(rng.randint(1, 40))]
        fields = {"n": rng.choice([1, 1, 3]), "priority": rng.choice([0, 1])}
        item = request(f"r{i}", prompt, 9, arrival=both.now, tenant=rng.choice("ab"), **fields)
        both.add(item)
        if rng.random() < 0.2:
            both.abort(f"r{rng.randrange(i + 1)}")
        both.step()
    both.finish()
    assert len(both.scheduler._waiting.backlog) == 0


def test_the_margin_holds_nineteen_twentieths_of_the_errors() -> None:
    """Who is predicted to be just in time is refused where predictions err."""
    waits = Waits(StepCost.learning())
    assert waits.margin == 0.0
    rng, margins = random.Random(3), []
    for i in range(3000):
        waits.admitted(WaitForecast(10.0, 11.0, 10.0, i), 10.0 * rng.uniform(0.5, 1.5))
        margins.append(waits.margin)
    assert sum(margins[1000:]) / 2000 == pytest.approx(0.45, abs=0.03)
    assert waits.correction == pytest.approx(1.0, abs=0.1)
    for i in range(3000, 3300):
        waits.admitted(WaitForecast(10.0, 11.0, 10.0, i), 10.0)
    assert waits.margin < 0.05


def test_who_is_let_in_does_not_swing_with_a_long_queue() -> None:
    """Errors of waits of ten seconds were followed within half of one. Then now nearly all are
    refused and now nobody is, and one in nine of those let in was too late."""
    trace = WORKLOADS["multi-turn"].make(np.random.default_rng(0), 55.0, 2750, 1.0)
    report = play(SERVED, trace, make_policy())
    accepted = [record for record in report.records if not record.refused]
    assert len(accepted) > 2000
    assert sum(record.ttft > TARGETS.ttft for record in accepted) < 0.03 * len(accepted)


def test_an_end_to_a_wait_that_none_was_foreseen_for_teaches_nothing() -> None:
    waits = Waits(StepCost.learning())
    waits.admitted(WaitForecast(math.inf, math.inf, math.inf), 3.0)
    waits.admitted(WaitForecast(0.0, 1.0, 0.0), 3.0)
    assert (waits.correction, waits.margin) == (1.0, 0.0)
