"""A controller and one live sequence, step by step."""

from __future__ import annotations

import numpy as np

from benchmarks.scheduling_policies import H200_8B
from benchmarks.speculation_simulated import (
    MOST,
)
from scheduler.allocation import Option
from scheduler.controller import Controller
from scheduler.plan import DraftTime, Row, RowResult, Shadow, StepPlan, StepResult
from scheduler.profile import StepShape
from scheduler.request import Request, SamplingParams, SchedulerConfig, Speculation
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence
from scheduler.speculation import NO_RULES
from scheduler.step_cost import StepCost

WILLING = Speculation()


class Alone:
    """A controller and one live sequence, whose drafts come true with a given chance."""

    def __init__(self, speculation: Speculation = WILLING, *options: Option, seed: int = 1) -> None:
        cost = StepCost.from_profile(H200_8B)
        every = Option((0,), False), Option((0, 1), True), Option((1,), True)
        self.policy = Controller(options or every, ["suffix", "model"], MOST, cost)
        self.rules = NO_RULES
        self.scheduler = Scheduler(SchedulerConfig(num_pages=2000), self.policy, cost=cost)
        params = SamplingParams(max_tokens=4000)
        self.scheduler.add(Request("0", (1,) * 40, params, 0.0, speculation=speculation), 0.0)
        ((self.sequence,),) = self.scheduler._requests.values()
        self.sequence.fed = len(self.sequence.tokens)
        self._rng = np.random.default_rng(seed)
        self._behind = 40  # tokens that the draft model has not read
        self.now = 0.0
        self.lengths: list[int] = []
        self.shadows: tuple[Shadow, ...] = ()
        self.idle = 0.0  # seconds between a step with drafts and its neighbours
        self.beside: list[Sequence] = []  # that are still being read

    def step(self, chance: float) -> None:
        self.rules = rules = self.policy.plan([self.sequence, *self.beside])
        drafts, drafters = self.sequence.drafts, self.sequence.drafters
        self.lengths.append(drafts)
        ahead = drafts if rules.ahead else 0
        row = Row(1, 1, None, True, drafts, drafters, ahead)
        right = 0
        while right < drafts and self._rng.random() < chance:
            right += 1
        done = RowResult((1,) * (right + 1), proposed=drafts)
        if drafts:
            done.drafter = drafters[-1]
            done.confidence = (0.6,) * drafts
            self.policy.learn(self.sequence, row, done)
        shape = StepShape(1, 1 + drafts, 40)
        plan = StepPlan(0, (), (row,), shape, rules.least, rules.heard)
        self._behind += right + 1
        work = DraftTime()
        if drafts and 1 in drafters:
            tokens = drafts + self._behind
            work = DraftTime(0.5e-3 * drafts + 2e-6 * tokens, drafts, tokens)
            self._behind = 0
        seconds = 4.5e-3
        if ahead:  # it pays under no circumstances
            seconds *= 3
            work = work._replace(beside=1e-3 * ahead, ahead=1)
        self.now += seconds + work.seconds + self.idle * any(self.lengths[-2:])
        result = StepResult(0, (done,), seconds, work, self.shadows)
        self.shadows = ()
        self.policy.settled(plan, result, self.now)

    def mean(self, steps: int) -> float:
        return sum(self.lengths[-steps:]) / steps
