"""Draft lengths of one stream of short texts, on a machine that may still be waking up."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from scheduler.allocation import Option
from scheduler.controller import Controller
from scheduler.plan import DraftTime, Row, RowResult, StepPlan, StepResult
from scheduler.profile import StepShape, chunk_pairs
from scheduler.request import Request, SamplingParams, SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.step_cost import StepCost

PROMPT, MOST = 60, 8
PLAIN, VERIFY, DRAFT, CHUNK = 1e-3, 1.3e-3, 0.1e-3, 2.5e-3  # seconds of a machine that is awake

Chance = Callable[[np.random.Generator], float]


class Texts:
    """One text after the other: each has a prompt, and a chance of its own that a draft is right.

    The first steps are slower by up to `sleepy` times, the more the earlier, and so is drafting;
    the first step of each kind takes up to `first` seconds more.
    """

    def __init__(self, seed: int, chance: Chance, sleepy: float = 0.0, first: float = 0.0) -> None:
        self._rng = np.random.default_rng(seed)
        self._chance = chance
        self._sleepy, self._wakes = self._rng.uniform(0, sleepy), self._rng.uniform(5, 80)
        self._first = {kind: self._rng.uniform(0, first) for kind in ("chunk", "plain", "drafts")}
        self._cost = StepCost.learning()
        options = [Option((0,), True, reads=True)]
        self._policy = Controller(options, ["model"], MOST, self._cost)
        config = SchedulerConfig(num_pages=2000)
        self._scheduler = Scheduler(config, self._policy, cost=self._cost)
        self._texts = 0
        self.now = 0.0
        self.tokens = 0
        self.drafted: list[bool] = []  # by step

    def write(self) -> None:
        self._texts += 1
        name, chance = str(self._texts), self._chance(self._rng)
        params = SamplingParams(max_tokens=96)
        self._scheduler.add(Request(name, (1,) * PROMPT, params, self.now), self.now)
        (sequence,) = self._scheduler._requests.pop(name)
        self._policy.begin(sequence)
        end, unread = PROMPT + int(self._rng.integers(8, 35)), PROMPT
        sequence.fed = 0
        while len(sequence.tokens) < end:
            self._policy.plan([sequence])
            live = sequence.fed > 0
            drafts, right = sequence.drafts if live else 0, 0
            while right < drafts and self._rng.random() < chance:
                right += 1
            row = Row(1, self._texts, None if live else (1,) * PROMPT, True, drafts, (0,))
            done = RowResult((1,) * (right + 1), proposed=drafts)
            work = DraftTime()
            if drafts:
                done.drafter, done.confidence = 0, (0.8,) * drafts
                self._policy.learn(sequence, row, done)
                read = drafts + unread
                seconds = self._slowness() * (DRAFT * drafts + 1.5e-6 * read)
                work, unread = DraftTime(seconds, drafts, read), 0
            if live:
                shape = StepShape(1, 1, len(sequence.tokens)).with_drafts(drafts, 1)
                kind, seconds = ("drafts", VERIFY) if drafts else ("plain", PLAIN)
            else:
                shape = StepShape(1, PROMPT, 0, chunk_pairs(PROMPT, 0))
                kind, seconds = "chunk", CHUNK
            seconds = seconds * self._slowness() + self._first.pop(kind, 0.0)
            sequence.tokens.extend([1] * (right + 1))
            sequence.fed = len(sequence.tokens)
            unread += right + 1
            self.tokens += right + 1
            self.drafted.append(drafts > 0)
            self.now += seconds + work.seconds + 20e-6
            self._cost.observe(shape, seconds)
            plan = StepPlan(len(self.drafted), (), (row,), shape)
            self._policy.settled(plan, StepResult(plan.step, (done,), seconds, work), self.now)

    def _slowness(self) -> float:
        noise = self._rng.lognormal(0.0, 0.1) * (3.0 if self._rng.random() < 0.02 else 1.0)
        return float(noise * (1.0 + self._sleepy * math.exp(-len(self.drafted) / self._wakes)))


def rates(seconds: float, seeds: int, chance: Chance, *machine: float) -> list[float]:
    """Tokens a second in so many seconds."""
    found = []
    for seed in range(seeds):
        texts = Texts(seed, chance, *machine)
        while texts.now < seconds:
            texts.write()
        found.append(texts.tokens / texts.now)
    return found


def mostly_right(rng: np.random.Generator) -> float:
    return 0.9 if rng.random() < 0.8 else 0.2


# Tokens a second without drafts: a text has 21, its prompt among them; steps are slower by 4.5 %
# in the mean than the times above.
PLAIN_RATE = 21 / (1.045 * (CHUNK + 20 * PLAIN) + 21 * 20e-6)


def test_what_a_waking_machine_has_taken_does_not_stop_drafts_for_long() -> None:
    """First steps take up to five times as long, some fifty milliseconds more."""
    found = rates(3.0, 20, mostly_right, 4.0, 0.05)
    assert min(found) > 1.1 * PLAIN_RATE
    assert np.mean(found) > 0.9 * np.mean(rates(3.0, 20, mostly_right))


def test_a_text_unlike_others_ends_drafts_for_itself_alone() -> None:
    resumed = []
    for seed in range(16):
        chances = iter([0.95] * 30 + [0.0] + [0.95] * 2)
        texts = Texts(seed, lambda rng, chances=chances: next(chances))
        for _ in range(31):
            texts.write()
        ended = not texts.drafted[-1]
        before = len(texts.drafted)
        texts.write()
        texts.write()
        if ended:
            resumed.append(np.mean(texts.drafted[before:]))
    assert len(resumed) >= 3
    assert min(resumed) > 0.5


def test_drafts_that_are_never_right_are_still_seldom() -> None:
    shares = []
    for seed in range(5):
        texts = Texts(seed, lambda rng: 0.1)
        while texts.now < 3.0:
            texts.write()
        shares.append(np.mean(texts.drafted[1000:]))
        assert texts.tokens / texts.now > 0.95 * PLAIN_RATE
    assert np.mean(shares) < 0.02
