"""How long will a new request wait? A fluid model of slots, memory and prompt work.

Three things can make a request wait: slots, memory, and prompts to compute before its own. For the
first two the model asks when enough has been handed out for all who are ahead and for it. At step t

    handed out(t) = x(t) + ∫ x / life        x(t) = free now + given back by running sequences by t

because whoever gets what was given back keeps it for `life` steps on average, and gives it back
again (memorylessly). A short queue waits for those who run, one by one; a long one for its own area
over the capacity. Prompts wait for chunks: tokens ahead over tokens a step. The longest of the
three counts, times the seconds of a step of that batch.

Guesses of length, prefix hits, a reserve: what the model does not know makes it wrong by a factor
that changes slowly, so predictions are corrected by what became of earlier ones.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.backlog import Work
from scheduler.profile import StepShape
from scheduler.sequence import WaitForecast
from scheduler.step_cost import StepCost

_RATE = 0.05  # smoothing of past waits, per admission that was predicted to wait, at most
_IN_TIME = 0.95  # of those let in for a target
_FIRST_ERROR = 0.3  # of a predicted wait, before any has ended
_LARGEST_ERROR = 3.0  # that counts in full
_STEP = 4.0  # by which the margin moves, times the smoothing and the usual error or itself
_BOUND = 4.0  # of the correction, either way
_PACE = 0.05  # smoothing of step times, per settled step
_FIRST_DELAY = 1.5  # times the predicted time, before a step beside prompts was seen
_DELAY_HELD = 500  # such steps, until a delay is forgotten by two thirds
_LONGEST_DELAY = 3.0  # that time is kept free for; a longer one is no matter of the step's size
KNOWN_STEPS = 8  # before so many nothing is predicted


class Releases:
    """When running sequences give one resource back. Amounts in its units, times in steps."""

    __slots__ = ("_held", "_integral", "_times")

    def __init__(self, free: float, gifts: Iterable[tuple[float, float]]) -> None:
        """`free` may be negative: more is promised than there is. `gifts` are times and amounts,
        ascending."""
        self._times, self._held, self._integral = [0.0], [free], [0.0]
        held, last, integral = free, 0.0, 0.0
        for time, amount in gifts:
            if held > 0.0:
                integral += held * (time - last)
            held += amount
            last = time
            self._times.append(time)
            self._held.append(held)
            self._integral.append(integral)

    def steps_until(self, demand: float, life: float) -> float:
        """Steps until `demand` was handed out, by whose owners it comes back after `life` steps."""
        times, held, integral = self._times, self._held, self._integral
        reached = bisect_left(range(len(times)), demand, key=lambda k: held[k] + integral[k] / life)
        if reached == 0:
            return 0.0
        at, rate = reached - 1, held[reached - 1] / life
        missing = demand - held[at] - integral[at] / life
        steps = times[at] + missing / rate if rate > 0.0 else math.inf
        return min(steps, times[reached]) if reached < len(times) else steps


@dataclass(frozen=True, slots=True)
class Batch:
    """What runs, as far as waiting for it goes."""

    rows: int
    context: int  # positions read by a step
    chunk: int  # prompt tokens that a step has room for
    prompt: float  # tokens of admitted prompts to compute yet
    slots: Releases
    memory: Releases  # KV positions


class Waits:
    """Predicts waits, and learns from those that have ended."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        # Of past waits, smoothed: seconds, the model's seconds, and the relative error.
        self._waited = self._modelled = 0.0
        self._error = _FIRST_ERROR
        self._margin = 0.0
        self._admitted = 0  # requests since the start
        self._wall = 0.0  # seconds from one settled step to the next, smoothed
        self._model = 0.0  # the same as the cost model has it
        self._steps = 0
        self._delay = _FIRST_DELAY
        self._settled_at: float | None = None  # None: the pipeline ran dry
        # Since the start: seconds from one settled step to the next, and those of the profile.
        self.seconds = self.uncorrected = 0.0

    @property
    def correction(self) -> float:
        """Actual over modelled waits of the last admissions, long ones counting most."""
        if self._modelled <= 0.0:
            return 1.0
        return max(1 / _BOUND, min(self._waited / self._modelled, _BOUND))

    @property
    def margin(self) -> float:
        """The share of a predicted wait by which 19 in 20 of those let in wait no longer.

        Under lasting overload every request that is let in is predicted to be just in time, and
        with a prediction that is right on average half of them would be late, after having taken
        what others would have used. More than half, since it is let in when the prediction errs
        that way. So this is a quantile of the errors, followed by steps of stochastic approximation
        (Robbins and Monro 1951) down the slope of its loss (Koenker and Bassett 1978).
        """
        return self._margin

    @property
    def stretch(self) -> float:
        """Seconds from one step to the next over the predicted seconds of a step: the engine's loop
        and whoever shares its processor come between."""
        if not self.known or self._model <= 0.0:
            return 1.0
        return max(1.0, min(self._wall / self._model, _BOUND))

    @property
    def longest_stretch(self) -> float:
        """The same for the slowest of the last hundreds of steps that do more than a token a row.

        These are what a gap target is kept by, and their times scatter: for other processes, for
        what the cost model does not know. A long prompt takes hundreds of them, and one that is
        late is the largest gap of every stream, so a quantile would not do.
        """
        return self.stretch * self._delay

    @property
    def known(self) -> bool:
        """Whether the time of a step is."""
        return self._steps >= KNOWN_STEPS and self._wall > 0.0

    def settled(self, shape: StepShape, seconds: float, now: float, busy: bool) -> None:
        """A step of `seconds` has settled; `busy` if another was in flight already."""
        wall = seconds if self._settled_at is None else now - self._settled_at
        predicted = self._cost.seconds(shape)
        if shape.tokens > shape.rows and shape.decode_context and self._settled_at is not None:
            self._delayed(wall, predicted * self.stretch)
        self._steps += 1
        self.seconds += wall
        self.uncorrected += predicted / self._cost.correction
        rate = max(_PACE, 1.0 / self._steps)
        self._wall += rate * (wall - self._wall)
        self._model += rate * (predicted - self._model)
        self._settled_at = now if busy else None

    def _delayed(self, wall: float, expected: float) -> None:
        """A step that a gap target is kept by took so long."""
        self._delay -= (self._delay - 1.0) / _DELAY_HELD
        if self._delay * expected < wall <= _LONGEST_DELAY * expected:
            self._delay = wall / expected

    def admitted(self, forecast: WaitForecast | None, waited: float) -> None:
        """A request got a slot after `waited` seconds.

        Waits are smoothed over as many admissions as there were since it arrived. Who follows
        errors faster than they are seen corrects them twice, and now lets in nobody, now everybody.
        """
        self._admitted += 1
        if forecast is None or not 2 * self._wall <= forecast.model_s < math.inf:
            return  # too short to learn from, or it was wrong, but nobody knows by how much
        if forecast.admission_s <= 0.0:
            return  # it was let in at once
        rate = min(_RATE, 1.0 / (self._admitted - forecast.admitted))
        self._waited += rate * (waited - self._waited)
        self._modelled += rate * (forecast.model_s - self._modelled)
        error = waited / forecast.admission_s - 1.0
        self._error += rate * (min(abs(error), _LARGEST_ERROR) - self._error)
        step = _STEP * rate * max(self._error, self._margin)
        self._margin += step * (_IN_TIME if error > self._margin else _IN_TIME - 1.0)
        self._margin = max(self._margin, 0.0)

    def forecast(self, batch: Batch, ahead: Work, own: Work) -> WaitForecast:
        """For a request whose `own` work comes after the work `ahead`."""
        chunk = batch.chunk
        all_ = Work()
        all_.add(ahead)
        all_.add(own)
        prefill = all_.prompt / all_.sequences / chunk  # steps of an average sequence
        life = all_.steps / all_.sequences + prefill
        life_of_memory = all_.area / all_.positions + prefill
        slots = batch.slots.steps_until(all_.sequences, life)
        memory = batch.memory.steps_until(all_.positions, life_of_memory)
        prompts = max((batch.prompt + ahead.prompt) / chunk - 1.0, 0.0)
        steps = max(slots, memory, prompts)
        computed = min(chunk, (batch.prompt + ahead.prompt) / steps) if steps > 0 else 0.0
        seconds = self.step_seconds(batch, computed)
        model = steps * seconds
        admission = model * self.correction
        begin = math.ceil(own.prompt / chunk) + 1  # its chunks, and the step in flight before them
        prompt_seconds = self.step_seconds(batch, min(own.prompt, chunk))
        first = admission + begin * prompt_seconds
        return WaitForecast(admission, first, model, self._admitted)

    def step_seconds(self, batch: Batch, chunk: float) -> float:
        """Of a step of this batch with so many prompt tokens."""
        if self._model <= 0.0:
            return self._wall
        tokens = round(chunk)
        pairs = tokens * (batch.context // max(batch.rows, 1))
        shape = StepShape(max(batch.rows, 1), batch.rows + tokens, batch.context, pairs)
        return self._cost.seconds(shape) * self._wall / self._model
