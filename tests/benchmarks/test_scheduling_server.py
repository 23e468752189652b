"""The real-server half of the scheduling benchmark: its client and its sums."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from statistics import median

import pytest

from benchmarks import scheduling_server
from benchmarks.fidelity import TRACES, Setting, SlowedMachine, compare, scaled, simulate_trace
from benchmarks.replay import (
    Fate,
    Played,
    Scripted,
    Slowdown,
    last_new,
    observed,
    replay,
    simulated,
    watched,
    with_prompts,
    without,
)
from benchmarks.scheduling_server import Gaps, LongPrompt, among_streams, gaps_between
from benchmarks.streaming import Endpoint, Sample
from scheduler.outcome import Targets
from scheduler.plan import StepPlan
from scheduler.profile import Profile, StepShape
from scheduler.trace import TraceRequest
from tests.benchmarks.scripted_server import Script, scripted_server

PROFILE = Path(__file__).parents[2] / "configs" / "profiles" / "cpu-demo.json"


def script_of(*arrivals: float) -> list[Scripted]:
    trace = [TraceRequest(arrival, 5, 3, 4) for arrival in arrivals]
    return with_prompts(trace, range(100), seed=1)


def play(script: Script, wanted: list[Scripted], since: float = 0.0) -> Played:
    with scripted_server(script) as url:
        endpoint = Endpoint.parse(url)
        bodies = [endpoint.post("/v1/completions", item.body("m")) for item in wanted]
        arrivals = [item.request.arrival for item in wanted]
        return asyncio.run(watched(endpoint, bodies, arrivals, since))


def test_requests_are_sent_at_their_times_whatever_became_of_others() -> None:
    wanted = script_of(0.0, 0.0, 0.2)
    played = play(Script(pause=0.1), wanted)
    for fate, item in zip(played.fates, wanted, strict=True):
        assert item.request.arrival <= fate.arrival < item.request.arrival + 0.09
        assert not fate.refused
        assert not fate.failed
        assert fate.tokens == 4
        assert 0.09 < fate.ttft < 0.5
        assert 0.09 < fate.gap < 0.5
    # The first two had not ended when the third was sent.
    assert min(fate.ended for fate in played.fates[:2]) > 0.3
    sent = observed(wanted, played)
    assert [request.output_tokens for request in sent] == [4, 4, 4]
    assert sent[2].arrival >= 0.2


def test_429_is_a_refusal_and_anything_else_a_failure() -> None:
    refused = play(Script(status=429), script_of(0.0)).fates[0]
    assert refused.refused
    assert not refused.failed
    failed = play(Script(status=500), script_of(0.0)).fates[0]
    assert not failed.refused
    assert failed.failed.startswith("HTTP 500")
    assert not any(fate.met(Targets()) for fate in (refused, failed))
    assert observed(script_of(0.0), Played([refused], 0.0, Slowdown(1.0)))[0].output_tokens == 3


def test_prompts_differ_and_are_the_same_again() -> None:
    one, two = script_of(0.0, 0.0)
    assert one.prompt != two.prompt
    assert one.seed != two.seed
    assert script_of(0.0, 0.0) == [one, two]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([7], (7, 1)), ([1, 2, 3], (3, 3)), ([1, 2, 1, 2, 2], (2, 2)), ([4, 4, 5, 4], (5, 3))],
)
def test_the_last_new_token_first_stands_where_it_ends_the_text(
    tokens: list[int], expected: tuple[int, int]
) -> None:
    token, length = last_new(tokens)
    assert (token, length) == expected
    assert tokens.index(token) == length - 1


def test_figures() -> None:
    fates = [
        Fate(1.0, 0.5, 0.1, 3.0, 10),
        Fate(2.0, 3.0, 0.1, 6.0, 20),  # too late
        Fate(2.0, 0.5, 0.9, 7.0, 30),  # too large a gap
        Fate(3.0, math.inf, 0.0, 3.0, 0, refused=True),
    ]
    warm = Fate(0.0, 9.0, 9.0, 20.0, 99)
    figures = without(Played([warm, *fates], 0.5, Slowdown(1.0)), 1).figures(Targets(1.0, 0.5))
    assert figures["seconds"] == 6.0
    assert figures["refused"] == 1
    assert figures["within targets"] == 0.25
    assert figures["goodput requests/s"] == pytest.approx(1 / 6)
    assert figures["output tok/s"] == pytest.approx(10)
    assert figures["TTFT p50 s"] == 0.5


def test_a_slower_machine_takes_longer_in_simulation() -> None:
    setting = Setting()
    profile = Profile.parse(PROFILE.read_text())
    trace = TRACES["chat"].make(100.0, 300, setting.max_model_len)
    assert all(r.prompt_tokens + r.max_tokens <= setting.max_model_len for r in trace)
    seconds = []
    for factor in (1.0, 2.0):
        report = simulate_trace(trace, setting, Targets(), profile, Slowdown(factor))
        played = simulated(report, 0.0, trace[-1].arrival)
        assert len(played.fates) == 300
        assert 0 < played.used <= 1
        seconds.append(played.figures(Targets())["seconds"])
    assert 1.3 < seconds[1] / seconds[0] < 2.1
    assert scaled(profile, 2.0).points[0][1] == 2 * profile.points[0][1]


def test_a_machine_is_as_slow_as_it_was_in_each_second() -> None:
    looks = [(2.0, 1.0, 1.0), (2.5, 1.5, 1.25), (3.0, 2.0, 1.5), (3.5, 2.0, 1.5), (4.1, 2.3, 1.8)]
    slowdown = Slowdown.of(looks)
    assert slowdown.mean == pytest.approx(1.3 / 0.8)
    assert slowdown.since == (2.0, 3.0)
    assert [slowdown.at(t) for t in (0.0, 2.9)] == pytest.approx([2.0, 2.0])
    assert [slowdown.at(t) for t in (3.0, 99.0)] == pytest.approx([1.0, 1.0])
    machine = SlowedMachine(Profile.parse(PROFILE.read_text()), slowdown)
    plan, shape = StepPlan(1, (), ()), StepShape(1, 1, 100)
    machine.planned(plan, 2.9)
    slow = machine.seconds(shape)
    machine.planned(plan, 3.0)
    assert machine.seconds(shape) == pytest.approx(slow / 2)
    assert math.isnan(Slowdown.of([]).mean)  # no step was seen
    assert math.isnan(Slowdown.of(looks[2:4]).mean)


def test_a_server_that_is_simulated_wrongly_misses(capsys: pytest.CaptureFixture[str]) -> None:
    fates = [Fate(float(i), 0.1, 0.1, i + 1.0, 5) for i in range(10)]
    real = Played(fates, 0.5, Slowdown(1.0)).figures(Targets())
    wrong = real | {"goodput requests/s": 0.85 * real["goodput requests/s"]}
    same, off = compare("x", real, real, {})[0], compare("x", real, wrong, {})[0]
    assert same.met
    assert off.value == pytest.approx(0.15)
    assert off.met is False
    assert "goodput" in capsys.readouterr().out


def test_gaps_that_overlap_with_a_span() -> None:
    sample = Sample(0.0, first=1.0, gaps=[1.0, 2.0, 3.0])  # events at 1, 2, 4 and 7
    assert list(gaps_between(sample, 2.5, 3.0)) == [2.0]
    assert list(gaps_between(sample, 1.5, 4.5)) == [1.0, 2.0, 3.0]
    assert list(gaps_between(sample, 7.5, 9.0)) == []
    assert list(gaps_between(Sample(0.0), 0.0, 9.0)) == []


def test_streams_run_while_long_prompts_come() -> None:
    sizes = LongPrompt(streams=2, stream_prompt=4, tokens=400, prompts=2, settle=0.2, calm=0.3)
    with scripted_server(Script(pause=0.01)) as url:
        gaps = asyncio.run(among_streams(Endpoint.parse(url), list(range(500)), [1, 2], sizes))
    assert isinstance(gaps, Gaps)
    assert len(gaps.ttft) == 2
    assert gaps.during
    assert 0.009 < median(gaps.calm) < 0.1


def test_replay_reports_what_could_not_be_sent() -> None:
    endpoint = Endpoint.parse("http://127.0.0.1:9")
    _, samples = asyncio.run(replay(endpoint, [b"x"], [0.0]))
    assert samples[0].error


def test_streams_draw_tokens_that_are_shown_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {1: "a", 2: " the", 3: "\ufffd"}  # 3: half a character

    def call(endpoint: Endpoint, path: str, body: dict[str, list[int]]) -> dict[str, str]:
        return {"prompt": shown[body["tokens"][0]]}

    monkeypatch.setattr(scheduling_server, "call", call)
    endpoint = Endpoint.parse("http://127.0.0.1:9")
    assert scheduling_server.whole_characters(endpoint, [2, 3, 1, 2]) == [1, 2]
