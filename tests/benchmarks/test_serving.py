"""The serving benchmark end to end, against scripted servers."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.bandwidth import weight_bytes
from benchmarks.freezing import ProcessTree
from benchmarks.serving import main
from benchmarks.workload import PromptPool
from tests.benchmarks.scripted_server import Script, scripted_server

small = [
    "--streams=1,3",
    "--prompt-tokens=12",
    "--output-tokens=5",
    "--rounds=2",
    "--repeats=3",
]


def last_json(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def test_one_server(capsys: pytest.CaptureFixture[str]) -> None:
    script = Script()
    with scripted_server(script) as url:
        assert main(["--base-url", url, *small]) == 0
    out = capsys.readouterr().out
    values = {row["metric"]: row["value"] for row in last_json(out)["rows"]}
    assert values["errors, server, 1 streams"] == 0
    assert values["tokens/event, server, 3 streams"] == 1
    assert values["prompt tokens, server, 3 streams"] == 12
    assert values["output tok/s, server, 3 streams"] > 0
    assert "| server" in out
    # One warm-up and three repeats of two rounds at one and at three streams, no prompt twice.
    assert len(script.bodies) == 4 * 2 * (1 + 3)
    prompts = {tuple(body["prompt"]) for body in script.bodies}
    assert len(prompts) == len(script.bodies)
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in script.bodies)


def test_chat_with_a_shared_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    script = Script()
    with scripted_server(script) as url:
        assert main(["--base-url", url, *small, "--chat", "--shared-prefix=8"]) == 0
    texts = [body["messages"][0]["content"] for body in script.bodies]
    assert len({text[:8] for text in texts}) == 1
    assert len({text[8:] for text in texts}) > len(texts) // 2


def test_comparison_interleaves_and_judges(capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow = Script(), Script(pause=0.002)
    with scripted_server(fast) as a, scripted_server(slow) as b:
        servers = ["--compare", f"a={a}", "--compare", f"b={b}"]
        arguments = [*servers, "--targets=1:0.001,3:1000", *small]
        assert main(arguments) == 0
    captured = capsys.readouterr()
    rows = {row["metric"]: row for row in last_json(captured.out)["rows"]}
    one, three = (rows[f"output tok/s a/b, {n} streams"] for n in (1, 3))
    assert one["met"] is True
    assert three["met"] is False
    assert one["interval"][0] <= one["value"] <= one["interval"][1]
    assert rows["TTFT p50 a/b, 1 streams"]["target"] == 1
    order = [line.split(",")[0] for line in captured.err.splitlines()[:8]]
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]  # warm-up, then repeats 1 to 3
    assert {tuple(x["prompt"]) for x in fast.bodies} == {tuple(x["prompt"]) for x in slow.bodies}


def test_errors_are_counted_and_fail_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(Script(fail_after=2)) as url:
        assert main(["--base-url", url, *small]) == 1
    captured = capsys.readouterr()
    values = {row["metric"]: row["value"] for row in last_json(captured.out)["rows"]}
    assert values["errors, server, 1 streams"] == 6
    assert values["TTFT p50 ms, server, 1 streams"] is None
    assert "scripted fault" in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--base-url=http://a", "--compare=a=http://a"],
        ["--compare=a=http://a"],
        ["--compare=x"],
        ["--streams=0", "--base-url=http://a"],
        ["--base-url=http://127.0.0.1:9"],
    ],
)
def test_bad_arguments_stop_with_a_sentence(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code not in (0, None)


def test_prompts_run_out_with_a_sentence() -> None:
    pool = PromptPool(list(range(30)), length=20, shared=0, seed=0)
    assert all(len(prompt) == 20 for prompt in pool.take(10))
    with pytest.raises(ValueError, match="distinct prompts"):
        pool.take(1)
    with pytest.raises(ValueError, match="shared prefix"):
        PromptPool(list(range(30)), length=20, shared=20, seed=0)


def test_a_pool_gives_the_same_prompts_again_from_a_mark() -> None:
    pool = PromptPool(list(range(200)), length=20, shared=4, seed=0)
    pool.take(3)
    mark = pool.mark()
    first = pool.take(5)
    assert pool.take(5) != first
    pool.back_to(mark)
    assert pool.take(5) == first


@pytest.mark.parametrize("tied", [True, False])
def test_weights_read_for_a_token(tmp_path: Path, tied: bool) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "model.embed_tokens.weight": {"data_offsets": [0, 100]},
        "model.layers.0.mlp.up_proj.weight": {"data_offsets": [100, 140]},
    }
    data = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(data)) + data + bytes(140))
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    assert weight_bytes(tmp_path) == (140 if tied else 40)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_frozen_tree_makes_no_progress(tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    child = f"while :; do echo >> {beat}; sleep 0.01; done"
    with subprocess.Popen(["sh", "-c", f"sh -c '{child}' & wait"]) as process:
        try:
            tree = ProcessTree(process.pid)
            deadline = time.monotonic() + 10
            while not beat.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            tree.stop()
            time.sleep(0.1)
            before = beat.stat().st_size
            time.sleep(0.2)
            assert beat.stat().st_size == before
            tree.resume()
            while beat.stat().st_size == before and time.monotonic() < deadline:
                time.sleep(0.01)
            assert beat.stat().st_size > before
        finally:
            for pid in reversed(ProcessTree(process.pid).pids()):
                subprocess.run(["kill", str(pid)], check=False)
