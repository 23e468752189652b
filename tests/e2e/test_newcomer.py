"""What a newcomer and an operator do with the real server: the README's examples word for word,
Prometheus' reading of /metrics, the benchmark and the load test."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import serving as benchmark
from loadtest import __main__ as loadtest
from tests.e2e.serving import REPOSITORY, Running, serve

readme = (REPOSITORY / "README.md").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serve(tmp_path_factory.mktemp("newcomer") / "log", "--threads", "1") as running:
        yield running


def example(language: str, word: str, server: Running) -> str:
    """The README's code block that contains `word`, at this server's address."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if word in block)
    assert "http://127.0.0.1:8000" in block
    return block.replace("http://127.0.0.1:8000", server.url)


def test_readme_python_example(server: Running) -> None:
    done = subprocess.run(
        [sys.executable, "-c", example("python", "from openai", server)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "path" in done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_readme_curl_example(server: Running) -> None:
    command = shlex.split(example("sh", "curl", server))
    done = subprocess.run([*command, "--silent"], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_metrics_in_prometheus_format(server: Running) -> None:
    body = {"model": "demo", "prompt": "import os", "max_tokens": 5, "ignore_eos": True}
    before = server.gauge("foresight_generation_tokens_total")
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
    assert server.gauge("foresight_generation_tokens_total") == before + 5
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert len({family.name for family in families}) == len(families) > 25
    for family in families:
        if family.type == "histogram":
            counts = [s.value for s in family.samples if s.name.endswith("_bucket")]
            assert counts == sorted(counts), family.name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_metrics_pass_promtool(server: Running) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
    )
    # 3 is a remark on style. One is known: the name is vLLM's.
    assert done.returncode in (0, 3), done.stderr
    remarks = [line for line in done.stderr.splitlines() if "iteration_tokens_total" not in line]
    assert remarks == []


@pytest.mark.parametrize("kind", [[], ["--chat"]])
def test_benchmark(server: Running, kind: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--streams=1,4",
        "--prompt-tokens=32",
        "--rounds=1",
        "--repeats=1",
        "--output-tokens=8",
        *kind,
    ]
    assert benchmark.main(["--base-url", server.url, *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    values = {row["metric"]: row["value"] for row in result["rows"]}
    assert values["errors, server, 4 streams"] == 0
    assert values["cached tokens, server, 4 streams"] == 0 or kind  # the template is shared
    assert values["output tok/s, server, 4 streams"] > 0


@pytest.mark.slow
def test_load_test_writes_its_report(server: Running, tmp_path: Path) -> None:
    # The other scenarios run against a scripted server in tests/loadtest.
    arguments = ["--users=2", "--spawn-rate=10", "--time=60", "--max-requests=5"]
    arguments += ["--scenario=chat", f"--host={server.url}", f"--out={tmp_path}"]
    assert loadtest.main(arguments) == 0
    assert "0 failed" in (tmp_path / "chat.md").read_text()
    assert (tmp_path / "chat.html").read_text().count("<svg") == 4
    samples = (tmp_path / "chat_samples.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt_tokens"] for line in samples]
    assert max(prompts) > 2 * min(prompts), "later turns carry the conversation"
