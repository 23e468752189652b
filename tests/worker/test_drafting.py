"""Who is asked in which order, who is heard, and what happens when a drafter fails."""

from __future__ import annotations

import pytest
import torch

from scheduler.plan import Admit, Row, Shadow, StepPlan
from scheduler.request import SamplingParams
from worker.drafters.base import LATER, NOTHING, Ask, Guess
from worker.drafting import Drafting
from worker.slots import SlotTable


class Scripted:
    """Says what it is told to."""

    name = "scripted"

    def __init__(self, guess: Guess = NOTHING) -> None:
        self.guess = guess
        self.asked: list[int] = []
        self.seen: list[tuple[list[int], list[int]]] = []
        self.gone: list[list[int]] = []
        self.fails = False

    def admit(self, slot: int, group: bytes) -> None:
        pass

    def ended(self, slot: int, tokens: list[int], prompt_len: int) -> list[bool]:
        self.gone.append(tokens)
        return [True] * (len(tokens) - prompt_len)

    def propose(self, asks: list[Ask], least: float) -> list[Guess]:
        if self.fails:
            raise RuntimeError("broken")
        self.asked += [ask.slot for ask in asks]
        return [self.guess for _ in asks]

    def verified(self, slot: int, fed: list[int], chosen: list[int]) -> None:
        self.seen.append((list(fed), list(chosen)))


def setting(*guesses: Guess) -> tuple[Drafting, list[Scripted], SlotTable]:
    slots = SlotTable(4, 100, 8, torch.device("cpu"))
    drafters = [Scripted(guess) for guess in guesses]
    drafting = Drafting(slots, drafters)
    drafting.admit(Admit(1, 1, SamplingParams(max_tokens=9), 0, 3, (), ()))
    drafting.draft(StepPlan(0, (), (Row(1, 1, (10, 11, 12), True),)))
    drafting.committed(1, [13], 0)
    return drafting, drafters, slots


def plan(drafters: tuple[int, ...], drafts: int = 4, **rules) -> StepPlan:
    return StepPlan(1, (), (Row(1, 1, None, True, drafts, drafters),), **rules)


def test_the_first_who_knows_is_taken() -> None:
    drafting, (silent, first, second), slots = setting(
        NOTHING, Guess([20, 21], [0.9, 0.8]), Guess([30], [0.9])
    )
    rows, work = drafting.draft(plan((0, 1, 2)))
    assert [row.drafts for row in rows] == [2]
    assert work.seconds > 0
    assert slots.tokens[1, 4:6].tolist() == [20, 21]
    assert (silent.asked, first.asked, second.asked) == ([1], [1], [])
    drafted = drafting.committed(1, [20, 99, 5], 1)
    assert drafted is not None
    assert drafted.drafter == 1
    assert first.seen == [([13, 20, 21], [20, 99, 5])]
    drafting.draft(plan((2,)))
    assert drafting._tokens[1] == [10, 11, 12, 13, 20, 99]


def test_who_promises_too_little_is_not_heard_before_others() -> None:
    modest, other = Guess([20, 21], [0.5, 0.5]), Guess([30], [0.9])
    drafting, _, slots = setting(modest, other)
    drafting.draft(plan((0, 1), heard=(0.8, 0.0)))  # it expects 0.75
    assert slots.tokens[1, 4] == 30
    drafting.draft(plan((0, 1), heard=(0.7, 0.0)))
    assert slots.tokens[1, 4] == 20
    drafting.draft(plan((0,), heard=(0.8, 0.0)))  # there is nobody else
    assert slots.tokens[1, 4] == 20


def test_what_was_heard_stays_where_nobody_else_knows() -> None:
    drafting, _, slots = setting(Guess([20], [0.5]), NOTHING)
    (row,), _ = drafting.draft(plan((0, 1), heard=(2.0, 0.0)))
    assert row.drafts == 1
    assert slots.tokens[1, 4] == 20


def test_what_was_not_heard_is_better_than_nothing() -> None:
    drafting, _, slots = setting(Guess([20], [0.5]), LATER)
    (row,), _ = drafting.draft(plan((0, 1), heard=(2.0, 0.0)))
    assert row.drafts == 1
    assert slots.tokens[1, 4] == 20


def test_catching_up_is_not_silence() -> None:
    drafting, (_, second), _ = setting(LATER, Guess([30], [0.9]))
    (row,), _ = drafting.draft(plan((0, 1)))
    assert row.drafts == 0
    assert second.asked == []
    drafted = drafting.committed(1, [50], 0)
    assert drafted is not None
    assert (drafted.drafter, drafted.guess.tokens) == (0, [])


def test_ended_texts_cast_shadows() -> None:
    drafting, (drafter,), _ = setting(NOTHING)
    assert drafting.take_shadows() == ()
    drafting.admit(Admit(1, 2, SamplingParams(max_tokens=9), 0, 3, (), ()))
    assert drafter.gone == [[10, 11, 12, 13]]
    assert drafting.take_shadows() == (Shadow(0, (True,)),)
    assert drafting.take_shadows() == ()


def test_a_drafter_that_fails_ends_drafting_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drafting, (good, bad), _ = setting(Guess([20], [0.9]), NOTHING)
    bad.fails = True
    said: list[str] = []
    monkeypatch.setattr("worker.drafting.log.exception", said.append)
    (row,), _ = drafting.draft(plan((1, 0)))
    assert row.drafts == 0
    assert said == ["a drafter has failed: from here on nothing is drafted any more"]
    assert drafting.committed(1, [14], 0) is None
    (row,), _ = drafting.draft(plan((0,)))
    assert row.drafts == 0
    assert good.asked == []
    assert drafting._tokens[1] == [10, 11, 12, 13, 14]


def test_nothing_is_drafted_behind_a_token_that_ends_the_text() -> None:
    drafting, _, slots = setting(Guess([20, 7, 21], [0.9, 0.8, 0.7]))
    ends = SamplingParams(max_tokens=9, stop_token_ids=frozenset({7}))
    drafting.admit(Admit(2, 1, ends, 0, 3, (), ()))
    drafting.draft(StepPlan(1, (), (Row(2, 1, (10, 11, 12), True),)))
    drafting.committed(2, [13], 0)
    rows = (Row(1, 1, None, True, 4, (0,)), Row(2, 1, None, True, 4, (0,)))
    drafted, _ = drafting.draft(StepPlan(2, (), rows))
    assert [row.drafts for row in drafted] == [3, 2]
    assert slots.tokens[1, 4:7].tolist() == [20, 7, 21]
    assert slots.tokens[2, 4:7].tolist() == [20, 7, 0]


def test_nothing_is_drafted_for_a_text_that_has_ended() -> None:
    drafting, (scripted,), _ = setting(Guess([20], [0.9]))
    slot = Row(2, 1, (10, 11, 7), True)
    drafting.admit(Admit(2, 1, SamplingParams(max_tokens=9, stop_token_ids=(7,)), 0, 3, (), ()))
    drafting.draft(StepPlan(1, (), (slot,)))
    # A prompt may end with such a token.
    rows = tuple(Row(number, 1, None, True, 4, (0,)) for number in (1, 2))
    assert [row.drafts for row in drafting.draft(StepPlan(2, (), rows))[0]] == [1, 1]
    drafting.committed(1, [20, 21], 1)
    drafting.committed(2, [7, 22], 0)
    scripted.asked.clear()
    assert [row.drafts for row in drafting.draft(StepPlan(3, (), rows))[0]] == [1, 0]
    assert scripted.asked == [1]
    assert [drafting.over(row) for row in (*rows, slot)] == [False, True, False]


def test_a_text_is_over_with_the_token_that_ends_it_whatever_came_after() -> None:
    """A step may choose another token behind a right draft that ends the text."""
    for least, over in ((0, True), (2, False)):
        drafting, _, _ = setting(Guess([7], [0.9]))
        params = SamplingParams(max_tokens=9, min_tokens=least, stop_token_ids=frozenset({7}))
        drafting.admit(Admit(2, 1, params, 0, 3, (), ()))
        drafting.draft(StepPlan(1, (), (Row(2, 1, (10, 11, 12), True),)))
        drafting.committed(2, [13], 0)
        live = Row(2, 1, None, True, 4, (0,))
        drafting.draft(StepPlan(2, (), (live,)))
        drafting.committed(2, [7, 21], 1)
        assert drafting.over(live) == over
        assert drafting._tokens[2] == [10, 11, 12, 13, 7] + [21] * (not over)
        drafting.admit(Admit(2, 2, params, 0, 3, (), ()))
        assert not drafting.over(live)


def test_it_is_told_how_much_came_to_the_texts_since_they_were_drafted_for() -> None:
    drafting, _, _ = setting(Guess([20, 21], [0.9, 0.8]))
    assert drafting.draft(plan((0,)))[1].tokens == 4  # the prompt's three, and one
    drafting.committed(1, [20, 99, 5], 1)
    assert drafting.draft(plan((0,)))[1].tokens == 2
