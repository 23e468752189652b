"""What a draft model remembers of each page, whoever had it before."""

from __future__ import annotations

import pytest

from tests.worker.remembering import Setting, both, check, text
from worker.drafters.base import LATER


@both
def test_pages_of_another_sequence_are_made_use_of(chained: bool) -> None:
    setting = Setting(chained)
    shared = text(1, 11)  # two whole pages and three tokens
    setting.admit(1, shared)
    setting.propose({1: 1})
    setting.admit(2, [*shared[:8], *text(2, 5)], setting.slots.pages[1][:2])
    (guess,) = setting.propose({2: 3})
    assert setting.model.forwards[0] == list(range(8, 13))
    check(guess, setting.expected(2, 3))


@both
def test_pages_count_as_far_as_the_draft_model_has_read_them(chained: bool) -> None:
    """The target has computed three pages, the draft model two of them."""
    setting = Setting(chained, most_tokens=8)
    shared = text(1, 14)
    setting.admit(1, shared)
    assert setting.propose({1: 1}) == [LATER]
    setting.admit(2, shared, setting.slots.pages[1][:3])
    (guess,) = setting.propose({2: 2})
    assert setting.model.forwards[0] == list(range(8, 14))
    check(guess, setting.expected(2, 2))


@both
def test_a_page_with_a_new_owner_is_read_anew(chained: bool) -> None:
    setting = Setting(chained)
    setting.admit(1, text(1, 11))
    setting.propose({1: 1})
    pages = setting.leave(1)
    # Another writes into the second page, and later a third finds both pages in the prefix cache.
    setting.free.append(pages[1])
    setting.admit(2, text(2, 3))
    assert setting.slots.pages[2][0] == pages[1]
    setting.admit(3, text(1, 11), pages[:2])
    (guess,) = setting.propose({3: 2})
    assert setting.model.forwards[0] == list(range(4, 11))
    check(guess, setting.expected(3, 2))


@both
def test_a_page_from_the_host_has_no_keys_of_the_draft_model(chained: bool) -> None:
    """The host keeps the target's pages alone. What follows one that is missing does not count."""
    setting = Setting(chained)
    setting.admit(1, text(1, 14))
    setting.propose({1: 1})
    pages = setting.slots.pages[1][:3]
    setting.admit(2, text(1, 14), pages, loaded=1)
    setting.propose({2: 1})
    assert setting.model.forwards == [list(range(8, 14))]
    setting.slots.writer[pages[0]] += 1
    setting.admit(3, text(1, 14), pages)
    setting.propose({3: 1})
    assert setting.model.forwards == [list(range(14))]


@both
@pytest.mark.parametrize(("right", "whole"), [(0, 1), (1, 2), (4, 2)])
def test_wrong_drafts_do_not_make_a_page_whole(chained: bool, right: int, whole: int) -> None:
    """The drafts after seven tokens begin with the last place of the second page."""
    setting = Setting(chained)
    setting.admit(1, text(1, 7))
    (guess,) = setting.propose({1: 4})
    setting.verify(1, guess.tokens, right)
    setting.admit(2, [*setting.tokens[1][:8], *text(2, 3)], setting.slots.pages[1][:2])
    (guess,) = setting.propose({2: 2})
    assert setting.model.forwards[0] == list(range(4 * whole, 11))
    check(guess, setting.expected(2, 2))
