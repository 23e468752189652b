"""The scheduler's judgement calls, each a small pure function: order, chunks, what is demoted,
swapping."""

from __future__ import annotations

from scheduler.profile import StepShape, chunk_pairs
from scheduler.request import Request
from scheduler.step_cost import StepCost

IN_FLIGHT = 2  # steps: one runs while the next waits
# A step is planned when so much of the time of the one before is left, by its prediction: a share
# that covers the prediction's error, and what planning and the way to the worker take.
HEADROOM, LEAST_HEADROOM = 0.3, 2.5e-3  # share, seconds; the loop sleeps in whole milliseconds


def plan_at(begins: float, seconds: float) -> float:
    """When to plan the step after one that begins then and is predicted to take so long.

    Early enough that the worker finds it waiting, and no earlier: who arrives before that is in it,
    and who arrives after it has to wait for a whole step more.
    """
    return begins + seconds - max(HEADROOM * seconds, LEAST_HEADROOM)


def order_of(request: Request, serial: int, ageing: float) -> tuple[float, int]:
    """Rank in every queue; lower is served sooner, and nothing ranked lower is its victim.

    Waiting `ageing` seconds makes up for one level of priority. Since everybody ages at the same
    rate the order of two sequences never changes, so it is fixed at arrival: no re-sorting, and
    whoever waits is outranked only by those who arrive within a bounded time after it.
    """
    return (request.priority * ageing + request.arrival, serial)


def chunk_size(fed: int, known: int, budget: int, page_size: int) -> int:
    """How many of the known tokens to feed next, `budget` at most.

    A chunk that does not reach the end stops at a page boundary where it can: full pages become
    shareable, and the next append starts on a page of its own.
    """
    end = fed + budget
    if end >= known:
        return known - fed
    aligned = end // page_size * page_size
    return (aligned if aligned > fed else end) - fed


def lane_size(budget: int, parts: int) -> int:
    """Of the tokens decodes leave in a step, how many long prompts leave to short ones.

    A prompt is long while more than that is left of it. So fewer than `parts` long prompts share
    a step, and short ones are served within a step or two even when a long one came first.
    """
    return budget // parts


def demotable(computed: int, kept: int, page_size: int) -> range:
    """The places of a sequence's pages that may be demoted, of which `computed` positions have
    settled: not the first page, on which much attention falls, and none of the last `kept`
    positions. No step in flight writes to any of them."""
    return range(1, (computed - kept) // page_size)


def swap_pays(cost: StepCost, tokens: int, page_size: int) -> bool:
    """Whether copying the pages of `tokens` positions to host memory and back takes no longer than
    computing them again, in steps that would run anyway.

    What is unknown counts as nothing, so without a profile of copies it pays.
    """
    again = cost.seconds(StepShape(1, 1 + tokens, 0, chunk_pairs(1 + tokens, 0)))
    alone = cost.seconds(StepShape(1, 1, 0, 1))
    return 2 * cost.copy_seconds(-(-tokens // page_size)) <= again - alone
