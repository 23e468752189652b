"""`Passing`: a step that ends a newcomer's prompt is without the rows of a flood, where they would
make it much longer.

Where a step's time hangs on its rows, as on a CPU, the newcomer then waits for little more than its
own prompt. The flood loses no work by it: what is lost is the fixed time of a step. Where rows are
nearly free that hardly ever happens.
"""

from __future__ import annotations

from scheduler.gap import gap_target
from scheduler.profile import StepShape
from scheduler.sequence import Sequence
from scheduler.spare import Spare
from scheduler.step_cost import StepCost
from scheduler.wait import Waits
from scheduler.work import Work, shape_of

GAIN = 0.75  # of the time with all rows: more is not worth it
SHARE = 0.02  # of the time that may be lost by it,
SAVED = 0.05  # seconds of which can be saved up

Rows = tuple[list[Sequence], list[Work | None]]


class Passing:
    """Counts what it may cost."""

    def __init__(self, cost: StepCost, waits: Waits, mtpot_target: float | None) -> None:
        """`mtpot_target`: the server's."""
        self._cost = cost
        self._waits = waits
        self._mtpot_target = mtpot_target
        self._saved = 0.0  # seconds
        self.gone = 0.0  # seconds of the last step, if it left rows out

    def stay(
        self, rows: list[Sequence], work: list[Work | None], context: int, spare: Spare | None
    ) -> Rows:
        """The rows of the coming step that are in it. Live ones of tenants that are ahead are not,
        if the step ends the prompt of another one, takes at most `GAIN` of its time without them,
        and the two steps together are within their gap targets; never twice in a row.

        context: positions that the live ones read. `spare`: of several tenants.
        """
        before, self.gone = self.gone, 0.0
        if spare is None:
            return rows, work
        usual = self._cost.seconds(StepShape(len(rows), len(rows), context))
        self._saved = min(self._saved + SHARE * usual, SAVED)
        if before or not spare.ending:
            return rows, work
        stay: list[tuple[Sequence, Work | None]] = []
        leave: list[tuple[Sequence, Work | None]] = []
        for row in zip(rows, work, strict=True):
            live = row[0].fed >= len(row[0].tokens)
            (leave if live and spare.ahead(row[0].account) else stay).append(row)
        whole = self._cost.seconds(shape_of([*stay, *leave]))
        alone, rest = self._cost.seconds(shape_of(stay)), self._cost.seconds(shape_of(leave))
        target = gap_target(self._mtpot_target, (sequence for sequence, _ in leave))
        late = target is not None and alone + whole > target / self._waits.longest_stretch
        lost = alone + rest - whole
        if not leave or late or alone > GAIN * whole or lost > self._saved:
            return rows, work
        self._saved -= lost
        self.gone = alone
        return [sequence for sequence, _ in stay], [of_row for _, of_row in stay]
