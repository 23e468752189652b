"""`Drafting`: fills the rows of a plan with drafts before they are verified."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from scheduler.plan import NO_DRAFTING, Admit, DraftTime, Row, Shadow, StepPlan
from worker.beside import Beside
from worker.drafters.base import LATER, NOTHING, Ask, Drafter, Guess
from worker.drafters.model import ModelDrafter
from worker.slots import SlotTable

SHADOW_SHARE = 0.002  # of the time may go into texts that nobody asked about
MOST_CREDIT = 0.004  # seconds of it that can be saved up: about a text, after which a step may wait

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Drafted:
    """What was drafted for one row."""

    drafter: int
    guess: Guess


def expected(guess: Guess) -> float:
    """How many of its drafts the drafter takes to be right."""
    belief, sum_ = 1.0, 0.0
    for confidence in guess.confidence:
        belief *= confidence
        sum_ += belief
    return sum_


class _Silent:
    """In place of any drafter."""

    name = "silent"

    def admit(self, slot: int, group: bytes) -> None:
        pass

    def ended(self, slot: int, tokens: list[int], prompt_len: int) -> list[bool] | None:
        return None

    def propose(self, asks: Sequence[Ask], least: float) -> list[Guess]:
        return [NOTHING for _ in asks]

    def verified(self, slot: int, fed: Sequence[int], chosen: Sequence[int]) -> None:
        pass


class Drafting:
    """The drafters of one worker, and what is known of each slot's tokens on the host.

    Drafts are written into the token table, in which verification finds them. Rows end up with as
    many as there are, which may be fewer than their plan allows.
    """

    def __init__(
        self,
        slots: SlotTable,
        drafters: Sequence[Drafter],
        model: ModelDrafter | None = None,
        beside: Beside | None = None,
    ) -> None:
        """`model`: the one among them that computes, if any does; `beside`: where it can do so
        while its drafts are verified, if it can."""
        self._beside = beside
        self._ahead, self._took, self._waited = 0, 0.0, 0.0  # rows, seconds; of this step
        self._slots = slots
        self._drafters = drafters
        self.model = model
        self._tokens: list[list[int]] = [[] for _ in slots.epoch]  # by slot, those known
        self._prompt = [0] * len(slots.epoch)  # by slot: tokens of it
        self._stops: list[frozenset[int]] = [frozenset()] * len(slots.epoch)  # by slot: they end it
        self._min_len = [0] * len(slots.epoch)  # by slot: so long it is before they do
        self._over = [False] * len(slots.epoch)  # by slot: one of them has
        self._known = [0] * len(slots.epoch)  # by slot: tokens when it was last drafted for
        self._of_slot: dict[int, Drafted] = {}  # of the step being run
        self._shadows: list[Shadow] = []  # since the last step
        self._credit, self._credited = MOST_CREDIT, time.perf_counter()  # seconds for `_end`

    @property
    def slowdown(self) -> float:
        """See `WorkerFacts.beside`."""
        return 0.0 if self._beside is None else self._beside.slowdown

    def admit(self, admit: Admit) -> None:
        slot = admit.slot
        with self._spared():
            if self._tokens[slot]:
                self._end(slot)
            for drafter in self._drafters:
                drafter.admit(slot, admit.group)
        self._tokens[slot] = list(admit.cached)
        self._prompt[slot] = admit.prompt_len
        self._stops[slot] = admit.params.stop_token_ids
        self._min_len[slot] = admit.prompt_len + admit.params.min_tokens
        self._over[slot] = False
        self._known[slot] = 0

    def _end(self, slot: int) -> None:
        """The former owner has gone: what it wrote is told to those who were not asked, while that
        takes hardly any time."""
        now = time.perf_counter()
        self._credit = min(self._credit + SHADOW_SHARE * (now - self._credited), MOST_CREDIT)
        self._credited = now
        if self._credit <= 0.0:
            return
        for number, drafter in enumerate(self._drafters):
            right = drafter.ended(slot, self._tokens[slot], self._prompt[slot])
            if right:
                self._shadows.append(Shadow(number, tuple(right)))
        self._credit -= time.perf_counter() - now

    def take_shadows(self) -> tuple[Shadow, ...]:
        taken, self._shadows = tuple(self._shadows), []
        return taken

    def needs_results(self, plan: StepPlan) -> bool:
        """Whether all steps before this one have to be read before it is drafted for.

        Drafters go by the tokens known on the host, so the step before a step with drafts is read
        first; and what was drafted is kept for one step, so a step with drafts is read before the
        next one.
        """
        return bool(self._of_slot) or any(row.drafts or row.ahead for row in plan.rows)

    def draft(self, plan: StepPlan) -> tuple[Sequence[Row], DraftTime]:
        """The plan's rows with the drafts they have; `needs_results` was heeded."""
        self._of_slot.clear()
        drafting: list[Row] = []
        for row in plan.rows:
            if row.chunk is not None:
                self._tokens[row.slot] += row.chunk
            elif row.drafts:
                drafting.append(row)
        if not drafting:
            if self.model is not None:
                self.model.forget()
            return plan.rows, NO_DRAFTING
        asking = [row for row in drafting if not self._over[row.slot]]
        started = time.perf_counter()
        read = sum(self._read(row.slot) for row in asking)
        with self._spared():
            round_ = 0
            while asking:
                asking = self._ask(asking, round_, plan)
                round_ += 1
        self._write()
        rows = [self._with_drafts(row) if row.drafts else row for row in plan.rows]
        depth = tokens = foreseen = 0
        if self.model is not None:
            self.model.forget()
            (depth, tokens), foreseen = self.model.take_work(), self.model.take_hits()
        seconds = time.perf_counter() - started
        return rows, DraftTime(seconds, depth, tokens or read, foreseen=foreseen)

    def over(self, row: Row) -> bool:
        """Whether its text has ended with a step before, as far as these were read: the plan was
        made before that was known."""
        return row.chunk is None and self._over[row.slot]

    def _read(self, slot: int) -> int:
        """How many tokens came to a text since this was asked last."""
        before, self._known[slot] = self._known[slot], len(self._tokens[slot])
        return self._known[slot] - before

    def look_ahead(self, rows: Sequence[Row]) -> None:
        """Starts to draft for what comes after these rows, which go to be verified. Until `wait`
        nothing else may be asked of the drafters."""
        model, beside = self.model, self._beside
        if model is None or beside is None:
            return
        number = self._drafters.index(model)
        asks: list[Ask] = []
        drafts: list[list[int]] = []
        for row in rows:
            if row.ahead and number in row.drafters and not self._over[row.slot]:
                drafted = self._of_slot.get(row.slot)
                asks.append(Ask(row.slot, self._tokens[row.slot], row.drafts, row.ahead))
                drafts.append([] if drafted is None else drafted.guess.tokens)
        if asks:
            self._ahead = len(asks)
            beside.start(lambda: model.foresee(asks, drafts))

    def wait(self) -> None:
        """For what `look_ahead` started, before anything is committed."""
        if self._beside is not None and self._beside.busy:
            with self._spared():
                took, waited = self._beside.wait()
                self._took, self._waited = self._took + took, self._waited + waited

    def finished(self, work: DraftTime) -> DraftTime:
        """The step is: what drafting has taken of it altogether."""
        self.wait()
        if not self._ahead and not self._took:
            return work  # nothing was made ahead
        seconds = work.seconds + self._waited
        work = work._replace(seconds=seconds, beside=self._took, ahead=self._ahead)
        self._ahead, self._took, self._waited = 0, 0.0, 0.0
        return work

    def close(self) -> None:
        if self._beside is not None:
            self._beside.close()

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """Nobody depends on drafts, so a drafter that fails ends drafting and nothing else."""
        try:
            yield
        except Exception:
            log.exception("a drafter has failed: from here on nothing is drafted any more")
            self._drafters = [_Silent() for _ in self._drafters]
            self.model = None
            self._of_slot.clear()

    def _ask(self, rows: list[Row], choice: int, plan: StepPlan) -> list[Row]:
        """Asks each row's drafter of that choice; those it had too little for."""
        least, heard = plan.least, plan.heard
        by_drafter: dict[int, list[Row]] = {}
        for row in rows:
            if choice < len(row.drafters):
                by_drafter.setdefault(row.drafters[choice], []).append(row)
        left: list[Row] = []
        for number, group in by_drafter.items():
            asks = [Ask(row.slot, self._tokens[row.slot], row.drafts, row.ahead) for row in group]
            stop = least[number] if number < len(least) else 0.0
            drafter = self._drafters[number]
            if drafter is self.model:
                guesses = self.model.propose(asks, stop, plan.patience)
            else:
                guesses = drafter.propose(asks, stop)
            for row, whole in zip(group, guesses, strict=True):
                guess = self._to_its_end(row.slot, whole)
                if guess is LATER:
                    # What another one has said, though it was not heard, is better than nothing.
                    self._of_slot.setdefault(row.slot, Drafted(number, guess))
                    continue
                if guess.tokens:
                    self._of_slot[row.slot] = Drafted(number, guess)
                    more = choice + 1 < len(row.drafters) and number < len(heard)
                    if not more or expected(guess) >= heard[number]:
                        continue
                left.append(row)
        return left

    def _to_its_end(self, slot: int, guess: Guess) -> Guess:
        """Without what comes after a token that would end the text: nobody gets that."""
        stops = self._stops[slot]
        for count, token in enumerate(guess.tokens, 1):
            if token in stops:
                return Guess(guess.tokens[:count], guess.confidence[:count])
        return guess

    def _write(self) -> None:
        slots: list[int] = []
        positions: list[int] = []
        values: list[int] = []
        for slot, drafted in self._of_slot.items():
            tokens, first = drafted.guess.tokens, len(self._tokens[slot])
            slots += [slot] * len(tokens)
            positions += range(first, first + len(tokens))
            values += tokens
        if values:
            table = self._slots.tokens
            at = torch.tensor([slots, positions], device=table.device)
            table[at[0], at[1]] = torch.tensor(values, dtype=torch.int32, device=table.device)

    def _with_drafts(self, row: Row) -> Row:
        drafted = self._of_slot.get(row.slot)
        return replace(row, drafts=0 if drafted is None else len(drafted.guess.tokens))

    def committed(self, slot: int, chosen: Sequence[int], accepted: int) -> Drafted | None:
        """What the target chose after the row's token and each of its drafts, and how many of
        those it confirmed. Returns what was drafted."""
        tokens = self._tokens[slot]
        drafted = self._of_slot.get(slot)
        if drafted is not None and drafted.guess.tokens:
            fed = [tokens[-1], *drafted.guess.tokens]
            with self._spared():
                self._drafters[drafted.drafter].verified(slot, fed, chosen)
        stops, least = self._stops[slot], self._min_len[slot]
        for token in chosen[: accepted + 1]:
            tokens.append(token)
            if token in stops and len(tokens) > least:
                self._over[slot] = True
                break
        return drafted
