"""Trace files and made traces."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.trace import (
    TraceError,
    TraceRequest,
    at_rate,
    dump_trace,
    mean_rate,
    merge,
    parse_trace,
)
from scheduler.workloads import WORKLOADS

GOOD = {"arrival": 1.5, "prompt_tokens": 10, "output_tokens": 5, "max_tokens": 9}


@st.composite
def requests(draw: st.DrawFn) -> TraceRequest:
    prompt, output = draw(st.integers(1, 9999)), draw(st.integers(1, 9999))
    group = draw(st.none() | st.text())
    return TraceRequest(
        draw(st.floats(0, 1e6)),
        prompt,
        output,
        output + draw(st.integers(0, 999)),
        group,
        0 if group is None else draw(st.integers(0, prompt)),
        draw(st.text()),
        draw(st.integers(-9, 9)),
    )


@given(st.lists(requests(), min_size=1))
def test_what_is_written_is_read(trace):
    lines = list(dump_trace(trace))
    assert all("\n" not in line for line in lines)
    assert parse_trace(lines) == sorted(trace, key=lambda request: request.arrival)


def test_a_line_is_read_as_documented():
    lines = ["", json.dumps({**GOOD, "prefix_group": 7, "prefix_tokens": 10, "tenant": "a"}), "  "]
    assert parse_trace(lines) == [TraceRequest(1.5, 10, 5, 9, "7", 10, "a")]


def test_arrivals_are_put_in_order():
    lines = [json.dumps({**GOOD, "arrival": at, "prompt_tokens": n}) for n, at in ((1, 2), (2, 1))]
    assert [request.prompt_tokens for request in parse_trace(lines)] == [2, 1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"arrival": -1}, "arrival must not be negative"),
        ({"arrival": float("nan")}, "arrival must be a finite number of seconds"),
        ({"arrival": 10**400}, "arrival must be a finite number of seconds"),
        ({"arrival": "now"}, "arrival must be a number"),
        ({"arrival": True}, "arrival must be a number"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1"),
        ({"prompt_tokens": 2.5}, "prompt_tokens must be a whole number"),
        ({"prompt_tokens": float("nan")}, "prompt_tokens must be a whole number"),
        ({"prompt_tokens": 10**400}, "prompt_tokens is more than 16777216"),
        ({"prompt_tokens": None}, "prompt_tokens must be a whole number"),
        ({"output_tokens": -3}, "output_tokens must be at least 1"),
        ({"output_tokens": 10}, "output_tokens (10) is more than max_tokens (9)"),
        ({"prefix_group": "a", "prefix_tokens": 11}, "prefix_tokens (11) is more than prompt_to"),
        ({"prefix_tokens": 3}, "prefix_tokens needs a prefix_group"),
        ({"prefix_group": 1.5}, "prefix_group must be text"),
        ({"tenant": 3}, "tenant must be text"),
        ({"priority": "high"}, "priority must be a whole number"),
        ({"output": 3}, "'output' is no field of a request"),
    ],
)
def test_bad_lines_are_one_sentence_with_their_number(change, sentence):
    lines = [json.dumps(GOOD), json.dumps({**GOOD, **change})]
    with pytest.raises(TraceError) as error:
        parse_trace(lines)
    assert str(error.value).startswith(f"line 2: {sentence}")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 1: this is no JSON"),
        ("[1]", "line 1: a request must be a JSON object"),
        ('{"arrival": 1}', "line 1: prompt_tokens is missing"),
        ("[" * 100_000, "line 1: this is nested too deeply"),
        ("", "the trace holds no request"),
    ],
)
def test_what_is_no_request_is_said(line, sentence):
    with pytest.raises(TraceError, match=f"^{sentence}"):
        parse_trace([line])


@pytest.mark.parametrize("name", WORKLOADS)
def test_made_traces_are_as_asked(name):
    make = WORKLOADS[name].make
    trace = make(np.random.default_rng(1), 10.0, 2000, 1.0)
    assert len(trace) == 2000
    assert trace == make(np.random.default_rng(1), 10.0, 2000, 1.0)
    assert trace != make(np.random.default_rng(2), 10.0, 2000, 1.0)
    assert trace == sorted(trace, key=lambda request: request.arrival)
    # Bursts and conversations come in clumps, so their rate settles slowly.
    assert mean_rate(trace) == pytest.approx(10, rel=0.25)
    assert parse_trace(dump_trace(trace)) == trace
    small = make(np.random.default_rng(1), 10.0, 2000, 0.1)
    ratio = sum(r.output_tokens for r in small) / sum(r.output_tokens for r in trace)
    assert ratio == pytest.approx(0.1, rel=0.1)
    # A cap says little about the length.
    assert sum(r.max_tokens for r in trace) > 1.8 * sum(r.output_tokens for r in trace)


def lengths(name: str, count: int = 4000) -> np.ndarray:
    trace = WORKLOADS[name].make(np.random.default_rng(0), 10.0, count, 1.0)
    return np.array([request.output_tokens for request in trace])


def test_lengths_are_those_promised():
    assert lengths("chat").mean() == pytest.approx(200, rel=0.1)
    decode = lengths("decode-heavy")
    assert (decode.min(), decode.max()) == pytest.approx((2048, 4096), rel=0.01)
    reasoning = lengths("reasoning")
    assert reasoning.mean() == pytest.approx(1500, rel=0.1)
    assert reasoning.max() == 8192
    before, after = np.split(lengths("shift"), 2)
    assert after.mean() == pytest.approx(5 * before.mean(), rel=0.15)


def test_bursts_are_denser_than_chance():
    def dispersion(name: str) -> float:
        trace = WORKLOADS[name].make(np.random.default_rng(0), 10.0, 4000, 1.0)
        counts = np.bincount([int(request.arrival) for request in trace])
        return counts.var() / counts.mean()

    assert dispersion("chat") == pytest.approx(1, abs=0.3)
    assert dispersion("bursts") > 5


def test_turns_begin_with_all_that_was_said():
    trace = WORKLOADS["multi-turn"].make(np.random.default_rng(0), 10.0, 2000, 1.0)
    last: dict[str | None, TraceRequest] = {}
    turns = 0
    for request in trace:
        assert request.prefix_tokens == request.prompt_tokens
        before = last.get(request.prefix_group)
        if before is not None:
            turns += 1
            assert request.prompt_tokens > before.prompt_tokens + before.output_tokens
        last[request.prefix_group] = request
    assert turns > 1000


def test_traces_are_joined_and_played_faster():
    one = [TraceRequest(float(i), 1, 1, 1) for i in range(5)]
    two = [TraceRequest(i + 0.5, 2, 2, 2) for i in range(5)]
    both = merge(one, two)
    assert [request.prompt_tokens for request in both] == [1, 2] * 5
    faster = at_rate(both, 20.0)
    assert mean_rate(faster) == pytest.approx(20)
    assert faster[3].arrival == pytest.approx(3 * 0.05)
