"""Stop strings and characters at all split points of the tokens, through one choice's text."""

from __future__ import annotations

import itertools

import pytest

from scheduler.request import Finish, FinishReason
from server.choice import ChoiceText
from server.job import View
from tests.fakes_engine import scored
from tests.server.helpers import TOKENIZER
from text.stops import StopStrings


def grouped(ids: list[int]) -> list[list[list[int]]]:
    """Every way to group tokens into steps."""
    ways = []
    for marks in itertools.product((False, True), repeat=len(ids) - 1):
        places = [i + 1 for i, mark in enumerate(marks) if mark]
        ways.append([ids[a:b] for a, b in itertools.pairwise([0, *places, len(ids)])])
    return ways


def run(groups: list[list[int]], view: View) -> tuple[str, int, list[int], list[int], object]:
    """Text, tokens counted, tokens with logprobs, token ids, stop reason."""
    choice = ChoiceText(0, TOKENIZER.detokenizer([]), view)
    pieces = []
    for group in groups:
        pieces.append(choice.push(group, [scored(t, 0, 512) for t in group]))
        if choice.ended:
            break
    else:
        pieces.append(choice.end(Finish(FinishReason.LENGTH)))
    assert [p.finish for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish is not None
    return (
        "".join(p.text for p in pieces),
        choice.count,
        [e.entry.token for p in pieces for e in p.logprobs],
        [t for p in pieces for t in p.tokens],
        pieces[-1].stop_reason,
    )


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("ab🎉cd", ("🎉",)),
        ("ab🎉cd", ("b🎉c", "zz")),
        ("xéyéz", ("yé", "éz")),
        ("hello world", ("o w",)),
        ("hello world", ("never", "world!")),
        ("aab aab", ("aab a",)),
        ("no stops 🎉", ()),
    ],
)
@pytest.mark.parametrize("include", [False, True])
def test_grouping_never_matters(text: str, stops: tuple[str, ...], include: bool) -> None:
    view = View(StopStrings(stops, include=include), logprobs=0, token_ids=True)
    ids = TOKENIZER.encode(text)
    found = {str(run(groups, view)) for groups in grouped(ids)}
    assert len(found) == 1
    shown, count, with_logprobs, tokens, stop = run([ids], view)
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if not ends:
        assert (shown, count, stop) == (text, len(ids), None)
        assert tokens == with_logprobs == ids
        return
    end = min(ends)
    assert stop in stops
    assert shown == (text[:end] if include else text[: end - len(str(stop))])
    complete = [i for i in range(len(ids) + 1) if text[:end] in TOKENIZER.decode(ids[:i])]
    assert count == complete[0]
    assert tokens == ids[:count]
    assert with_logprobs == ids[: len(with_logprobs)]
    covered = b"".join(TOKENIZER.token_bytes(t) for t in with_logprobs)
    assert covered.startswith(shown.encode())


def test_text_without_needs_is_decoded_by_the_step() -> None:
    view = View(StopStrings(()))
    assert not view.per_token
    ids = TOKENIZER.encode("hello 🎉 world")
    choice = ChoiceText(0, TOKENIZER.detokenizer([]), view)
    assert choice.push(ids, ()).text == "hello 🎉 world"
    assert choice.count == len(ids)
