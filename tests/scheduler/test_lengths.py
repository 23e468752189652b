"""Guesses of length: calibrated, sticky, and honest about what they have not seen."""

from __future__ import annotations

import json

import numpy as np
import pytest

from scheduler.choices import choices_of
from scheduler.lengths import LengthWindow, PastFuture
from scheduler.request import FinishReason, SchedulerConfig
from scheduler.sequence import Sequence
from tests.scheduler.driving import EOS, request

CONFIG = SchedulerConfig(num_pages=10)


def a_sequence(max_tokens: int = 1000, **fields) -> Sequence:
    fields.setdefault("stop", [EOS])
    (sequence,) = choices_of(request("r", [1, 2, 3], max_tokens, **fields), CONFIG, 10**6, 0)
    return sequence


def produce(sequence: Sequence, count: int) -> None:
    sequence.tokens += [0] * count


def at(window: LengthWindow, length: int) -> float:
    return float(window.survival(np.array([length]))[0])


def test_survival_is_the_share_that_got_longer() -> None:
    window = LengthWindow(doubt=1e-9)
    for length in (10, 20, 20, 40):
        window.add(length, cut_short=False)
    survival = window.survival(np.array([0, 9, 10, 19, 20, 39, 40, 99])).tolist()
    assert survival == pytest.approx([1, 1, 0.75, 0.75, 0.25, 0.25, 0, 0], abs=1e-6)


def test_what_was_cut_short_counts_only_as_long_as_it_was_seen() -> None:
    """Kaplan-Meier by hand: of 4, one ends at 10; of the 2 not cut at 15, one ends at 20."""
    window = LengthWindow(doubt=1e-9)
    for length, cut in ((10, False), (15, True), (20, False), (30, False)):
        window.add(length, cut)
    assert at(window, 10) == pytest.approx(0.75)
    assert at(window, 20) == pytest.approx(0.375)


def test_without_a_past_an_answer_gets_as_long_as_it_may() -> None:
    guess = PastFuture(LengthWindow())
    sequence = a_sequence(max_tokens=77)
    guess.begin(sequence)
    assert sequence.guess == 77


def test_doubt_fades() -> None:
    window = LengthWindow(doubt=4.0)
    shares = []
    for count in (4, 40, 400):
        while len(window) < count:
            window.add(10, cut_short=False)
        shares.append(at(window, 10))
    assert shares == pytest.approx([1 / 2, 1 / 11, 1 / 101])


def test_only_the_limit_ends_what_has_no_stop_token() -> None:
    window = LengthWindow()
    window.add(5, cut_short=False)
    sequence = a_sequence(max_tokens=50, stop=[])
    PastFuture(window).begin(sequence)
    assert sequence.guess == 50


def test_a_sequence_keeps_its_place_as_long_as_it_lives() -> None:
    """So its guess never falls, is always ahead of it, and tells the same share of what is left."""
    rng = np.random.default_rng(0)
    window = LengthWindow(doubt=0.1)
    for length in rng.integers(1, 500, 300).tolist():
        window.add(length, cut_short=False)
    guess = PastFuture(window, seed=3)
    sequence = a_sequence()
    guess.begin(sequence)
    while len(sequence.tokens) < 600:
        before = sequence.guess
        produce(sequence, 1)
        guess.foresee([sequence], 1)
        assert sequence.guess > sequence.output_len
        assert sequence.guess >= before
    assert sequence.guess == sequence.cap, "beyond all that was seen"


def test_futures_cover_what_may_come_of_each_sequence_and_of_all_together() -> None:
    window = LengthWindow(doubt=0.01)
    for length in range(1, 1001):
        window.add(length, cut_short=False)
    guess = PastFuture(window, seed=1)
    sequences = [a_sequence(max_tokens=5000) for _ in range(200)]
    for number, sequence in enumerate(sequences):
        guess.begin(sequence)
        produce(sequence, number)
    lengths = guess.foresee(sequences, guess.futures)
    assert lengths.shape == (guess.futures, 200)
    assert lengths[0].tolist() == [sequence.guess for sequence in sequences]
    produced = np.arange(200)
    assert (lengths > produced).all()
    # Of each sequence, one in every eighth of what is left.
    eighths = (lengths - produced - 1) * guess.futures // (1000 - produced)
    assert (np.sort(eighths, axis=0) == np.arange(guess.futures)[:, None]).mean() > 0.98
    # From one sequence to the next in another order, so that no future is one of long answers.
    means = lengths.mean(axis=1)
    assert np.abs(means / lengths.mean() - 1).max() < 0.1
    assert guess.foresee(sequences[:1], 3).tolist() == lengths[:3, :1].tolist()


def test_min_tokens_bound_a_guess_from_below() -> None:
    window = LengthWindow(doubt=0.01)
    for length in range(1, 101):
        window.add(length, cut_short=False)
    guess = PastFuture(window)
    for _ in range(50):
        sequence = a_sequence(min_tokens=60)
        guess.begin(sequence)
        assert sequence.guess >= 60


@pytest.mark.parametrize("produced", [0, 100, 400])
def test_guesses_are_calibrated_on_lengths_not_seen(produced: int) -> None:
    """The probability integral transform of actual lengths is uniform, given what was produced."""
    rng = np.random.default_rng(produced)
    past, future = rng.lognormal(5.5, 0.8, (2, 4000)).astype(np.int64) + 1
    window = LengthWindow(size=1000)
    for length in past.tolist():
        window.add(length, cut_short=False)
    actual = future[future > produced]
    base = at(window, produced)
    transformed = 1 - window.survival(actual) / base
    histogram = np.histogram(transformed, bins=10, range=(0, 1))[0] / len(actual)
    # The window's own sampling error: 1000 lengths, fewer beyond `produced`.
    error = 4 * np.sqrt(0.1 * 0.9 / (1000 * base)) + 4 * np.sqrt(0.1 * 0.9 / len(actual))
    assert np.abs(histogram - 0.1).max() < error


def test_draws_follow_the_window_and_cover_it_evenly() -> None:
    rng = np.random.default_rng(5)
    window = LengthWindow(doubt=0.01)
    lengths = rng.lognormal(5, 1, 1000).astype(np.int64) + 1
    for length in lengths.tolist():
        window.add(length, cut_short=False)
    guess = PastFuture(window)
    guesses = []
    for _ in range(64):
        sequence = a_sequence(max_tokens=10**5)
        guess.begin(sequence)
        guesses.append(sequence.guess)
    assert set(guesses) <= set(lengths.tolist())
    # Independent draws would miss the mean by 8 % (one standard deviation); dispersed ones do not.
    bulk = np.minimum(guesses, 1000).mean() / np.minimum(lengths, 1000).mean()
    assert abs(bulk - 1) < 0.04


def test_the_past_is_kept_between_starts() -> None:
    window = LengthWindow(size=3)
    for length in (1, 2, 3, 4):
        window.add(length, cut_short=length == 3)
    again = LengthWindow(size=3)
    again.restore(json.loads(json.dumps(window.state())))
    assert again.state() == window.state()
    assert len(again) == 3


@pytest.mark.parametrize(
    "state",
    [{}, {"version": 2, "lengths": []}, {"version": 1, "lengths": [[-1, 0]]}, {"version": 1}],
)
def test_a_state_that_is_none_is_refused(state: dict) -> None:
    with pytest.raises(ValueError, match=r".+"):
        LengthWindow().restore(state)


def test_an_aborted_answer_says_nothing() -> None:
    guess = PastFuture(LengthWindow())
    sequence = a_sequence()
    produce(sequence, 9)
    for reason in FinishReason:
        guess.ended(sequence, reason)
    assert guess.window.state()["lengths"] == [[9, 0], [9, 1]]
