"""Drafts in simulation: which are right is recorded in the trace, what they take is given."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.plan import NO_DRAFTING, DraftTime, StepPlan

# Multiples of it, modulo one, are spread evenly: as good as random, and the same each time.
_SPREAD = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class DraftingCosts:
    """What a draft model takes, one forward after the other, and where it runs.

    With a device of its own it works ahead while the target verifies, for the likely outcomes: all
    drafts right and the token after them as well, or the first wrong one replaced by a token it has
    foreseen. Then the next drafts are there when the target is done, or as soon as they can be.
    """

    forward: float  # seconds
    token: float = 0.0  # seconds more for each row of a forward
    ahead: bool = False
    foreseen: float = 0.0  # share of corrections that it has drafted on for


class Drafts:
    """What became of each slot's drafts, and what the next ones take."""

    def __init__(self, slots: int, costs: DraftingCosts | None) -> None:
        self._costs = costs
        self._right = [""] * (slots + 1)
        self._ready = [False] * (slots + 1)  # drafts for what came were made while it was verified
        self._verified = 0.0  # seconds of the step before

    def admit(self, slot: int, right: str) -> None:
        self._right[slot], self._ready[slot] = right, False

    def verify(self, slot: int, produced: int, drafts: int) -> int:
        """How many drafts after so many output tokens are right."""
        right = self._right[slot]
        run = 0
        while run <= drafts and right[produced + run : produced + run + 1] == "1":
            run += 1
        if self._costs is not None and self._costs.ahead:
            chance = (produced + 1) * _SPREAD % 1.0
            self._ready[slot] = run > drafts or (run < drafts and chance < self._costs.foreseen)
        return min(run, drafts)

    def time(self, plan: StepPlan, verifying: float) -> DraftTime:
        """What the target waits for before it verifies, which takes `verifying` seconds."""
        before, self._verified = self._verified, verifying
        costs = self._costs
        asked = [row for row in plan.rows if row.drafts]
        if costs is None or not asked:
            return NO_DRAFTING

        def chain(rows: list[int]) -> float:
            return max(rows, default=0) * costs.forward + sum(rows) * costs.token

        now = [row.drafts for row in asked if not self._ready[row.slot]]
        hidden = [row.drafts for row in asked if self._ready[row.slot]]
        waits = chain(now) + max(chain(hidden) - before, 0.0)
        return DraftTime(waits, max(row.drafts for row in asked), sum(row.drafts for row in asked))
