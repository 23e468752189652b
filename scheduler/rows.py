"""From the rows of a decision to those of a plan: pages get names, and sequences move on."""

from __future__ import annotations

from dataclasses import replace

from scheduler.decide import Decision
from scheduler.pages import PagePool
from scheduler.plan import Row, StepPlan, StepResult
from scheduler.profile import StepShape, chunk_pairs
from scheduler.sequence import Sequence


def launch_rows(decision: Decision, pool: PagePool) -> tuple[tuple[Row, ...], StepShape]:
    """The rows, and the shape of their step. Sequences are fed and pending from here on."""
    rows: list[Row] = []
    more = pairs = 0  # of chunks: tokens beyond one a row, and positions attended
    drafted = live = 0  # drafts, and the rows that may have some
    for sequence, work in zip(decision.rows, decision.work, strict=True):
        if work is None:
            sequence.pending_min += 1
            sequence.pending_max += 1
            rows.append(sequence.plain_row)
            live += 1
            continue
        drafts = work.drafts
        new: tuple[int, ...] = ()
        if work.pages:
            new = pool.take(work.pages)
            sequence.pages += new
        if work.tokens:
            more += work.tokens - 1
            pairs += chunk_pairs(work.tokens, sequence.fed)
            row = _chunk(sequence, work.tokens, new)
        else:
            live += 1
            drafted += drafts
            drafters = sequence.drafters if drafts else ()
            row = Row(
                sequence.slot, sequence.epoch, None, True, drafts, drafters, work.ahead, None, new
            )
        if row.samples:
            sequence.pending_min += 1
            sequence.pending_max += 1 + drafts
        rows.append(row)
    shape = StepShape(len(rows), len(rows) + more, decision.context, pairs)
    return tuple(rows), shape.with_drafts(drafted, live)


def _chunk(sequence: Sequence, use: int, new: tuple[int, ...]) -> Row:
    tokens, start, end = sequence.tokens, sequence.fed, sequence.fed + use
    sequence.fed = end
    reaches = end == len(tokens)
    following = None if reaches or sequence.prompt_logprobs is None else tokens[end]
    chunk = tuple(tokens[start:end])
    return Row(sequence.slot, sequence.epoch, chunk, reaches, 0, (), 0, following, new)


def shape_as_run(plan: StepPlan, result: StepResult) -> StepShape:
    """The shape of a step in which rows may have drafted less than they were allowed to, or were
    not run at all."""
    unused = sum(
        row.drafts - done.proposed
        for row, done in zip(plan.rows, result.rows, strict=True)
        if row.drafts
    )
    if not unused and not result.over:
        return plan.shape
    live = sum(row.chunk is None for row in plan.rows)
    shape = plan.shape.with_drafts(-unused, live) if unused else plan.shape
    if not result.over:
        return shape
    return replace(
        shape,
        rows=shape.rows - result.over,
        tokens=shape.tokens - result.over,
        decode_context=shape.decode_context * (live - result.over) // live,
    )
