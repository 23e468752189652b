"""The stop rule against a character-by-character oracle, at every way to cut the text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text.stops import StopStrings


def oracle(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """What may be shown, and the stop string: the first prefix that ends with one, the longest."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    matcher = StopStrings(stops, include=include).matcher()
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.matched is not None:
            return shown, matcher.matched
    return shown + matcher.flush(), None


def cuts(text: str) -> list[list[str]]:
    """Every way to cut a text into pieces."""
    ways = []
    for marks in itertools.product((False, True), repeat=len(text) - 1):
        places = [i + 1 for i, mark in enumerate(marks) if mark]
        ways.append([text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])])
    return ways


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("xxSTOPyy", ["STOP"]),
        ("aababaab", ["abaa"]),
        ("xabcdx", ["abcd", "bc"]),
        ("xabcdx", ["cd", "abcd"]),
        ("no stop", ["zz", "opx"]),
        ("ends on", ["onward", "on"]),
        ("é🎉ü🎉🎉", ["🎉🎉"]),
        ("aaaa", ["aaaaa"]),
    ],
)
def test_every_cut_gives_the_same(text: str, stops: list[str], include: bool) -> None:
    expected = oracle(text, stops, include)
    for pieces in cuts(text):
        assert run(pieces, stops, include) == expected, pieces


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    st.booleans(),
)
def test_random_texts(pieces: list[str], stops: list[str], include: bool) -> None:
    assert run(pieces, stops, include) == oracle("".join(pieces), stops, include)


@settings(max_examples=200, deadline=None)
@given(
    st.text("abc", max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_holds_back_no_more_than_needed(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops).matcher()
    shown = "".join(matcher.push(char) for char in text)
    if matcher.matched is None:
        held = max(
            (k for s in stops for k in range(len(s)) if k and text.endswith(s[:k])), default=0
        )
        assert shown == text[: len(text) - held]


def test_unarmed_matches_do_not_stop_and_lose_nothing() -> None:
    matcher = StopStrings(["ab"]).matcher()
    shown = matcher.push("xab", armed=False) + matcher.push("ya") + matcher.push("bz")
    assert (shown, matcher.matched) == ("xaby", "ab")


def test_a_match_begun_before_min_tokens_may_complete_after() -> None:
    matcher = StopStrings(["ab"]).matcher()
    assert matcher.push("xa", armed=False) == "x"
    assert matcher.push("b") == ""
    assert matcher.matched == "ab"


def test_empty_strings_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def test_long_stop_strings_stay_linear() -> None:
    """A naive search would compare 1000 characters at each of 200,000 places."""
    matcher = StopStrings(["a" * 1000 + "b"]).matcher()
    shown = sum(len(matcher.push("a" * 100)) for _ in range(2000))
    assert shown == 200_000 - 1000
