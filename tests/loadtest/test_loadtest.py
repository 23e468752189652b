"""The load test: scenarios, the streaming client, a headless run and its report."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from benchmarks.streaming import Endpoint
from loadtest import report
from loadtest.__main__ import main
from loadtest.client import StreamingClient, delta_text
from loadtest.results import Answer, duration, summarise
from loadtest.scenario import Slo, load, load_all
from tests.benchmarks.scripted_server import Script, scripted_server


class Fired:
    """Stands for locust's request event."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def fire(self, **event: object) -> None:
        self.seen.append(event)

    def of(self, kind: str) -> list[dict]:
        return [event for event in self.seen if event["request_type"] == kind]


def test_every_scenario_has_a_user_class_of_its_name() -> None:
    # The classes are found by locust under these names; importing locust patches the process, so
    # the file is read, not imported.
    source = (Path(report.__file__).parent / "locustfile.py").read_text()
    assert set(load_all()) == {"chat", "completion", "mixed"}
    for name in load_all():
        assert (
            f'class {name.capitalize()}(ScenarioUser):\n    scenario = scenarios["{name}"]'
            in source
        )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("kinds: []\nabout: x", "at least one kind"),
        ("about: x\nkinds: [{name: a, endpoint: embeddings}]", "chat or completion"),
        ("about: x\nkinds: [{name: a, endpoint: chat, wieght: 1}]", "unknown key wieght"),
        ("about: x\nkinds: [{name: a, endpoint: chat, output_tokens: [5, 2]}]", "range"),
        ("about: x\nkinds: [{name: a, endpoint: completion, turns: 2}]", "turns"),
        ("kinds: [{name: a, endpoint: chat}]", "about"),
        ("[]", "not a mapping"),
    ],
)
def test_wrong_scenarios_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        load(path)


@pytest.mark.parametrize("chat", [True, False])
def test_client_fires_answer_first_token_and_gaps(chat: bool) -> None:
    fired = Fired()
    with scripted_server(Script(pause=0.002)) as url:
        client = StreamingClient(Endpoint.parse(url), fired, 5)
        body: dict[str, object] = {"max_tokens": 4}
        body |= {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        for _ in range(2):  # the second one on the same connection
            sample, text = client.send(path, body, "kind")
            assert text == "w0 w1 w2 w3 "
            assert (sample.error, sample.tokens, sample.prompt_tokens) == (None, 4, 2)
        client.close()
    assert [len(fired.of(kind)) for kind in ("POST", "TTFT", "inter-token")] == [2, 2, 6]
    whole, first = fired.of("POST")[0], fired.of("TTFT")[0]
    assert whole["response_time"] > first["response_time"] >= 2
    # Single gaps may be zero on a busy machine (two events in one read), their sum may not.
    gaps = sum(gap["response_time"] for gap in fired.of("inter-token")[:3])
    assert 0 < gaps <= whole["response_time"] - first["response_time"]


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (Script(fail_after=2), "scripted fault"),
        (Script(cut_after=2), "."),
        (Script(status=429), "HTTP 429"),
        (Script(pause=1.0), "."),
    ],
)
def test_client_reports_every_failure_once(script: Script, problem: str) -> None:
    fired = Fired()
    with scripted_server(script) as url:
        client = StreamingClient(Endpoint.parse(url), fired, 0.3)
        sample, _ = client.send("/v1/completions", {"prompt": "hi", "max_tokens": 4}, "kind")
        client.close()
    assert sample.error
    assert problem in sample.error or problem == "."
    assert [event["request_type"] for event in fired.seen] == ["POST"]
    assert fired.seen[0]["exception"] is not None


def test_delta_text_reads_both_kinds_and_nothing_else() -> None:
    assert delta_text(b'data: {"choices":[{"text":"a"}]}\n') == "a"
    assert delta_text(b'data: {"choices":[{"delta":{"content":"b"}}]}\n') == "b"
    for line in (b'data: {"choices":[]}', b"data: [DONE]\n", b"\n", b": ping\n"):
        assert delta_text(line) == ""


def answer(**changes: object) -> Answer:
    values = {
        "scenario": "mixed",
        "kind": "short",
        "ended": 100.0,
        "total_ms": 2000.0,
        "ttft_ms": 10.0,
        "gaps_ms": [5.0, 5.0, 500.0],
        "output_tokens": 4,
        "prompt_tokens": 8,
        "cached_tokens": 0,
        "error": None,
    }
    return Answer(**(values | changes))  # type: ignore[arg-type]


def test_goodput_judges_first_token_and_typical_gap() -> None:
    slo = Slo(ttft_ms=10, inter_token_ms=5)
    assert answer().good(slo)  # one slow gap is not the median
    assert not answer(ttft_ms=11.0).good(slo)
    assert not answer(gaps_ms=[6.0, 6.0, 1.0]).good(slo)
    assert not answer(error="x").good(slo)
    assert not answer(ttft_ms=None).good(slo)


def test_summary_leaves_failed_requests_out_of_the_times() -> None:
    answers = [answer(), answer(error="x", ttft_ms=9e9, output_tokens=3)]
    summary = summarise("all", answers, Slo())
    assert (summary.requests, summary.errors, summary.output_tokens) == (2, 1, 4)
    assert summary.ttft_ms == (10, 10, 10)
    assert summary.gap_ms[0] == 5
    assert duration([answer(), answer(ended=103.0)]) == 5
    assert duration([]) == 0
    assert math.isnan(summarise("none", [], Slo()).ttft_ms[0])


@pytest.mark.parametrize("scenario", ["completion", "mixed"])
def test_a_headless_run_writes_its_report(
    scenario: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--users=3", "--spawn-rate=10", "--time=30", "--max-requests=9"]
    with scripted_server(Script()) as url:
        status = main([f"--scenario={scenario}", f"--host={url}", f"--out={tmp_path}", *arguments])
    assert status == 0, capfd.readouterr()
    samples = (tmp_path / f"{scenario}_samples.jsonl").read_text().splitlines()
    # The limit ends the run; what was in flight may still be counted.
    assert 9 <= len(samples) <= 12
    tokens = sum(json.loads(line)["output_tokens"] for line in samples)
    with (tmp_path / f"{scenario}_stats.csv").open() as file:
        stats = list(csv.DictReader(file))
    counts = {
        kind: sum(int(row["Request Count"]) for row in stats if row["Type"] == kind)
        for kind in ("POST", "TTFT", "inter-token")
    }
    assert counts["POST"] == counts["TTFT"] == len(samples)
    assert counts["inter-token"] == tokens - len(samples)
    markdown = (tmp_path / f"{scenario}.md").read_text()
    page = (tmp_path / f"{scenario}.html").read_text()
    assert "0 failed" in markdown
    assert page.count("<svg") == 4
    for image in tmp_path.glob("*.svg"):
        assert f"({image.name})" in markdown


def test_report_of_failures_names_them(tmp_path: Path) -> None:
    prefix = tmp_path / "chat"
    bad = answer(error="HTTP 429", ttft_ms=None, gaps_ms=[], output_tokens=0)
    fields = list(Answer.__slots__)
    Path(f"{prefix}_samples.jsonl").write_text(
        "".join(json.dumps({f: getattr(a, f) for f in fields}) + "\n" for a in (bad, bad))
    )
    Path(f"{prefix}_failures.csv").write_text(
        'Method,Name,Error,Occurrences\nPOST,chat,"RuntimeError(<HTTP 429>)",2\n'
    )
    assert report.main([str(prefix)]) == 0
    assert "2 failed" in prefix.with_suffix(".md").read_text()
    page = prefix.with_suffix(".html").read_text()
    assert "RuntimeError(&lt;HTTP 429&gt;)" in page
