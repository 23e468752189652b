"""What a draft model is fed: what is new to it, and of long texts a piece a step."""

from __future__ import annotations

import pytest

from tests.worker.remembering import Setting, both, check, text
from worker.drafters.base import LATER


@both
@pytest.mark.parametrize(
    ("right", "fed_next"), [(0, [10]), (1, [11]), (2, [12]), (3, [13]), (4, [13, 14])]
)
def test_only_what_is_new_is_computed(chained: bool, right: int, fed_next: list[int]) -> None:
    """Right drafts have been fed when they were continued; the last one was not."""
    setting = Setting(chained)
    setting.admit(1, text(1, 10))
    (guess,) = setting.propose({1: 4})
    fed = setting.model.forwards
    assert fed[0] == list(range(10))
    if not chained:
        assert fed[1:] == [[10], [11], [12]]
    assert setting.drafter.take_work() == (4, 13)
    assert setting.drafter.take_work() == (0, 0)
    setting.verify(1, guess.tokens, right)
    (guess,) = setting.propose({1: 2})
    assert setting.model.forwards[0] == fed_next
    check(guess, setting.expected(1, 2))
    assert setting.drafter.take_work() == (2, len(fed_next) + 1)


@both
def test_a_single_draft_was_not_fed_whether_right_or_not(chained: bool) -> None:
    setting = Setting(chained)
    setting.admit(1, text(1, 10))
    (guess,) = setting.propose({1: 1})
    assert setting.drafter.take_work() == (1, 10)
    setting.verify(1, guess.tokens, 1)
    setting.propose({1: 1})
    assert setting.model.forwards == [[10, 11]]


@both
def test_who_was_not_asked_catches_up(chained: bool) -> None:
    setting = Setting(chained)
    setting.admit(1, text(1, 10))
    setting.admit(2, text(2, 7))
    setting.propose({1: 1, 2: 1})
    setting.tokens[1] += text(3, 9)
    setting.propose({2: 1})
    assert setting.model.forwards == [[6]]
    first, second = setting.propose({1: 3, 2: 2})
    # Who has the least to catch up with comes first.
    assert setting.model.forwards[0] == [6, *range(10, 19)]
    check(first, setting.expected(1, 3))
    check(second, setting.expected(2, 2))


@both
def test_long_texts_are_caught_up_with_in_pieces(chained: bool) -> None:
    setting = Setting(chained, most_tokens=16)
    setting.admit(1, text(1, 40))
    setting.admit(2, text(2, 5))
    first, second = setting.propose({1: 2, 2: 2})
    assert first is LATER
    check(second, setting.expected(2, 2))
    assert setting.model.forwards[0] == [*range(5), *range(11)]
    assert setting.propose({1: 2}) == [LATER]
    assert setting.model.forwards == [list(range(11, 27))]
    assert setting.drafter.take_work() == (3, 16 + 1 + 16)
    (first,) = setting.propose({1: 2})
    assert setting.model.forwards[0] == list(range(27, 40))
    check(first, setting.expected(1, 2))


@both
def test_who_is_up_to_date_drafts_whatever_the_budget(chained: bool) -> None:
    setting = Setting(chained, most_tokens=2)
    for slot in (1, 2, 3):
        setting.admit(slot, text(slot, 1))
    setting.admit(4, text(4, 6))
    *near, far = setting.propose({4: 2, 1: 2, 2: 2, 3: 2})[1:] + setting.propose({4: 2})
    for slot, guess in zip((1, 2, 3), near, strict=True):
        check(guess, setting.expected(slot, 2))
    assert far is LATER
    assert setting.model.forwards == [[0, 1]]  # the budget had been spent on the others before


@both
def test_nobody_asks_for_nothing(chained: bool) -> None:
    setting = Setting(chained)
    assert setting.propose({}) == []
    assert setting.model.forwards == []
    assert setting.drafter.take_work() == (0, 0)
