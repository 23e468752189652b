"""The commands for a GPU, in dry runs; and what they compute by hand-made numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_bench, gpu_check, gpu_parts
from benchmarks.gpu_device import Machine, roomy_folder
from benchmarks.gpu_models import CONFIGS, Models, kv_numbers, parameters_read, prefill_operations
from benchmarks.gpu_parts import Note
from benchmarks.gpu_peers import parse_points
from benchmarks.report import Row
from models.decoder import Decoder
from models.spec import ModelSpec
from worker.drafters.base import Ask


def last_line(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


@pytest.mark.slow
def test_check_in_a_dry_run(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    record = tmp_path / "check.json"
    args = ["--dry-run", "--quick", "--only", "logits", "kernels", "--json", str(record)]
    assert gpu_check.main(args) == 0
    found = last_line(capfd.readouterr().out)
    assert found["dry_run"] is True
    assert found["benchmark"] == "gpu_check"
    assert {row["met"] for row in found["rows"]} == {True, None}
    assert json.loads(record.read_text())["rows"] == found["rows"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_bench_in_a_dry_run(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tables = ["rates", "decode", "prefill", "peers", "weights"]
    assert gpu_bench.main(["--dry-run", "--work-dir", str(tmp_path), "--only", *tables]) == 0
    found = last_line(capfd.readouterr().out)
    assert found["dry_run"] is True
    assert {row["target"] for row in found["rows"]} == {None}  # nothing is claimed
    for table in ("decode, 8B", "prefill, 8B", "peers, 4 requests", "copy bandwidth"):
        assert any(row["metric"].startswith(table) for row in found["rows"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("benchmark", [gpu_check, gpu_bench])
def test_without_a_gpu_it_says_so(benchmark) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        benchmark.main([])


def run(parts: dict[str, str], monkeypatch: pytest.MonkeyPatch, minutes: float = 1.0):  # type: ignore[no-untyped-def]
    """Parts that are lines of Python."""

    def command(arguments: list[str], seconds: float) -> tuple[str, int | None]:
        return original([sys.executable, "-c", parts[arguments[4]]], seconds)

    original = gpu_parts._run
    monkeypatch.setattr(gpu_parts, "_run", command)
    return gpu_parts.run_parts("x", Machine("cpu", True), list(parts), [], minutes, None)


ROW = 'row: {"metric": "m", "value": 1.5, "target": 1.0}'


def test_rows_and_notes_are_heard_among_other_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"a": f"print('noise'); print('''{ROW}'''); print('note: left out')"}
    rows, well = run(parts, monkeypatch)
    assert well
    assert rows == [Row("m", 1.5, 1.0)]
    assert "- left out" in capsys.readouterr().out


def test_a_part_that_fails_loses_neither_its_rows_nor_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"a": f"print('''{ROW}'''); raise SystemExit(3)", "b": f"print('''{ROW}''')"}
    rows, well = run(parts, monkeypatch)
    assert not well
    assert len(rows) == 2
    assert "a: failed, exit code 3" in capsys.readouterr().out


def test_a_part_that_hangs_is_stopped_and_the_rest_is_not_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_parts, "LEAST", 0.5)
    parts = {
        "a": f"import time; print('''{ROW}''', flush=True); time.sleep(60)",
        "b": "print('never')",
    }
    rows, well = run(parts, monkeypatch, minutes=4 / 60)
    assert not well
    assert len(rows) == 1
    out = capsys.readouterr().out
    assert "a: stopped, the time was up" in out
    assert "b: not run, the time was up" in out


def test_told_is_heard(capsys: pytest.CaptureFixture[str]) -> None:
    told = [Row("m", 2.0, 3.0, "at most"), Note("why")]
    assert gpu_parts.tell(iter(told)) == 0
    assert gpu_parts.listen(capsys.readouterr().out) == ([told[0]], ["why"])


def test_rooflines_count_what_a_step_reads() -> None:
    spec = ModelSpec.from_hf(CONFIGS["llama-3.1-8b"])
    assert parameters_read(spec) == pytest.approx(7.504e9, rel=1e-3)
    assert 2 * kv_numbers(spec) == 131_072
    tiny = ModelSpec.from_hf(CONFIGS["qwen3-8b"] | {"num_hidden_layers": 2, "vocab_size": 1000})
    with torch.device("meta"):
        model = Decoder(tiny, max_model_len=8, device=torch.device("meta"))
    small = sum(p.numel() for p in model.parameters()) - model.embedding.numel()
    # The norms of heads and the final one are not counted.
    assert parameters_read(tiny) == pytest.approx(small, rel=1e-4)
    products = 2 * (parameters_read(spec) - 4096 * 128_256) * 8192
    # Scores and weighted sums, each a multiplication and an addition, over half of all pairs.
    pairs = 4 * 32 * 4096 * 8192**2 / 2
    assert prefill_operations(spec, 8192) == pytest.approx(products + pairs, rel=1e-3)


def test_models_are_made_once_in_their_folder(tmp_path: Path) -> None:
    models = Models(tmp_path, dry=True)
    folder = models.random("qwen3-30b-a3b", num_hidden_layers=3)
    spec = ModelSpec.from_hf(json.loads((folder / "config.json").read_text()))
    assert spec.moe is not None
    assert spec.hidden_size == 64
    assert folder != models.random("qwen3-30b-a3b")


def test_a_folder_with_room_is_found_or_missed(tmp_path: Path) -> None:
    assert roomy_folder(1, tmp_path) == tmp_path
    with pytest.raises(SystemExit, match="are needed for models"):
        roomy_folder(1 << 62, tmp_path)


def test_points_are_read() -> None:
    assert parse_points("1:512:128,32:8:4") == [(1, 512, 128), (32, 8, 4)]


def test_a_drafter_of_known_chance_is_right_as_often() -> None:
    text = tuple(range(1000, 3000))
    drafter = gpu_bench.KnownDrafter([(1, 2, 3), text], 0.8)
    hits = total = 0
    for at in range(1, 1900, 3):
        (guess,) = drafter.propose([Ask(1, list(text[:at]), 5)], 0.0)
        assert guess.confidence == [0.8] * 5
        hits += sum(a == b for a, b in zip(guess.tokens, text[at:], strict=False))
        total += 5
    assert hits / total == pytest.approx(0.8, abs=0.03)
    drafter.admit(1, b"")
    assert drafter.propose([Ask(1, [9, 9], 5)], 0.0)[0].tokens == []  # a text it does not know


def test_texts_part_where_they_differ_first() -> None:
    wanted = ((1, 2, 3), (0.5, 0.25, 0.125))
    assert gpu_check.divergence(wanted, wanted) is None
    assert gpu_check.divergence(wanted, ((1, 5, 3), (0.0, 0.0, 0.0))) == 0.25
    assert gpu_check.divergence(wanted, ((1, 2), (0.0, 0.0))) == 0.0
