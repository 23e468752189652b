"""`allocate`: as many drafts for each sequence as pay, if one option drafts for all.

A step that verifies n tokens takes t(n) seconds (`step_cost.py`), drafting takes its own; what they
bring is one token a row and the drafts that turn out right. Draft j of a row counts only if all
before it are right, so what it is expected to bring is the survival a(j) = c(1)·…·c(j). The best
set of drafts for a given number of them is that with the largest survivals, in all rows together,
and as a(j) falls with j it holds a row's first drafts before its later ones. So

    rate(S) = (rows + sum of the S largest a) / (t(rows + S) + drafting)

is looked at for every S, and the best one taken: the rule of TETRIS (arXiv 2502.15197), of
AdaServe's throughput stage (2501.12162) and of DSpark. S = 0 is among them. Where a draft model
drafts, the number of its forwards in a row counts beside, so every depth is looked at as well.

That is right where one step is like the next. Where prompts are about to become rows, a token is
soon made at less cost than now, in a step that more rows share, and drafts have to be worth that:
with R the plain rate of the rows to come, or the best rate(S) if it is higher, the best set is that
with the largest (tokens of S) - R · (seconds of S). For R = rate(S) it is the same set as before
(Dinkelbach 1967).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.draft_cost import DraftCost

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

MOST_CERTAIN = 0.95  # a draft is worth its time if it is right with this probability, whatever else


@dataclass(frozen=True, slots=True)
class Option:
    """One order in which drafters are asked."""

    drafters: tuple[int, ...]
    computes: bool  # a model is among them
    ahead: bool = False  # which works ahead
    reads: bool = False  # which has to read a text before it drafts for it


@dataclass(frozen=True, slots=True)
class Verifying:
    """The seconds that a step takes to verify so many tokens, those of the rows included."""

    tokens: Floats  # rising
    seconds: Floats

    def of(self, tokens: Floats | float) -> Floats:
        return np.asarray(np.interp(tokens, self.tokens, self.seconds))

    def slower(self, times: float) -> Verifying:
        return Verifying(self.tokens, self.seconds * times)


@dataclass(frozen=True, slots=True)
class Batch:
    """What is the same whatever option drafts."""

    plain: float  # tokens per second without drafts
    soon: float  # the same, once the prompts that are nearly read are rows as well
    room: Counts  # [rows]: drafts that each sequence may have
    drafts: int  # that the step has room for
    overhead: float  # seconds between two steps
    longest: float  # seconds that may lie between two beginnings of steps

    @property
    def nobody(self) -> Allocation:
        """No drafts for any."""
        return Allocation(self.plain, 0.0, np.zeros_like(self.room))


@dataclass(frozen=True, slots=True)
class Promise:
    """What an option's drafts are expected to bring."""

    survival: Floats  # [rows, positions]: that a draft and all before it are right
    proposed: Floats  # [positions]: that there is one at all, if so many are allowed
    # [positions, 1]: the share of rows that have drafts, by how many these are
    served: Floats | float = 1.0
    unread: Floats | float = 0.0  # [rows]: tokens that have to be read for a row's first draft


@dataclass(frozen=True, slots=True)
class Allocation:
    """Numbers of drafts, and what they are predicted to bring."""

    rate: float  # tokens per second
    least: float  # a further draft pays only if it is right with this probability
    drafts: Counts  # [rows]


def allocate(
    batch: Batch, option: Option, promise: Promise, cost: DraftCost, verifying: Verifying
) -> Allocation:
    """The best numbers of drafts by this option. `cost`: of its drafts."""
    rows, most = promise.survival.shape
    allowed = np.arange(most) < batch.room[:, None]
    worth = np.where(allowed, promise.survival, 0.0).ravel()
    ranked = np.argsort(-worth, kind="stable")
    ranked = ranked[worth[ranked] > 0.0]
    # More than the step takes would be cut off without asking which are the best.
    ranked = ranked[: max(batch.drafts, 0)]
    if not len(ranked):
        return batch.nobody
    row, column = np.divmod(ranked, most)
    depths = np.arange(1, most + 1)[:, None] if option.computes else np.array([[most]])
    taken = column < depths  # [depths, drafts]
    gained = np.cumsum(np.where(taken, worth[ranked], 0.0), axis=1)
    tokens = np.cumsum(np.where(taken, promise.proposed[column], 0.0), axis=1)
    asked = np.cumsum(column == 0)
    if option.computes:
        unread = np.broadcast_to(promise.unread, rows)[row]
        computed = tokens + np.cumsum(np.where(column == 0, unread, 0.0))
        drafting = cost.seconds(asked, depths + option.ahead, computed)
    else:
        drafting = cost.seconds(asked, 0, asked + gained)  # read as they come
    seconds = verifying.of(rows + promise.served * tokens)
    seconds = np.maximum(seconds, drafting) if option.ahead else seconds + drafting
    seconds = seconds + batch.overhead
    rates = (rows + promise.served * gained) / seconds
    rates[seconds > batch.longest] = 0.0
    worth_of_time = max(float(rates.max()), batch.soon)
    net = np.where(rates > batch.plain, rates - worth_of_time, -np.inf) * seconds
    depth, last = divmod(int(np.argmax(net)), len(ranked))
    if net[depth, last] <= rows - worth_of_time * rows / batch.plain:
        return batch.nobody
    drafts = np.bincount(row[: last + 1][taken[depth, : last + 1]], minlength=rows)
    price = _price(worth_of_time, drafts, cost, verifying)
    return Allocation(float(rates[depth, last]), price, drafts)


def _price(rate: float, drafts: Counts, cost: DraftCost, verifying: Verifying) -> float:
    """How probable one more draft must be right for the tokens that its time would bring."""
    size = len(drafts) + float(drafts.sum())
    more = float(verifying.of(size + 1) - verifying.of(size))
    return min(rate * (cost.of_a_draft(int(np.count_nonzero(drafts))) + more), MOST_CERTAIN)
