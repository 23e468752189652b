"""`foresight calibrate` on the bundled draft model, and what serving does with the file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from cli.calibrate import pieces, prompts_of
from cli.config import PROJECT
from cli.main import main
from engine.build import build_worker
from engine.calibrating import build_reader
from engine.config import EngineConfig
from kernels.kv.balance import Balance
from kernels.kv.calibration import Calibration
from kernels.kv.paged import Paged
from kernels.kv.presets import NAMES
from models.balance import apply_balance
from tests.engine.test_build import CACHE
from worker.kv_moments import head_scales

DRAFT = PROJECT / "assets" / "demo" / "draft"
TEXT = (PROJECT / "cli" / "main.py").read_text()


def calibrate(folder: Path, *more: str, kv_format: str = "k4v2h") -> int:
    prompts = folder / "prompts.txt"
    prompts.write_text(TEXT)
    return main(
        [
            *("calibrate", "--model", str(DRAFT), "--prompts", str(prompts)),
            *("--output", str(folder / "kv.json"), "--kv-format", kv_format),
            *("--device", "cpu", "--dtype", "float32", "--no-compile", "--tokens", "270"),
            *more,
        ]
    )


def test_a_format_is_fitted_and_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(tmp_path, "--limit", "10") == 0
    shown = capsys.readouterr().out
    assert "int4h" in shown
    assert "turbo3" in shown
    found = Calibration.parse((tmp_path / "kv.json").read_text())
    assert found.kv_format == "k4v2h"
    assert found.eight_bit_layers == ()
    config = EngineConfig.of(
        model=str(DRAFT),
        kv_format="k4v2h",
        kv_calibration=str(tmp_path / "kv.json"),
        device="cpu",
        compile=False,
        num_pages=100,
        max_model_len=512,
    )
    worker, _ = build_worker(config, lambda phase: None)
    worker.close()


def test_heads_of_fp8_get_scales(tmp_path: Path) -> None:
    """Those that hold twice the largest numbers of the prompts; and the server has them."""
    assert calibrate(tmp_path, "--limit", "10", kv_format="fp8") == 0
    found = Calibration.parse((tmp_path / "kv.json").read_text())
    assert found.scales is not None
    assert found.scales.keys.shape == found.scales.values.shape == found.key_means.shape[:2]
    options = {"model": str(DRAFT), "dtype": "float32", "device": "cpu", "compile": False}
    reader, tokenize, _ = build_reader(EngineConfig.of(**options))
    apply_balance(reader.model, found.balance)
    texts = [list(tokenize(TEXT)[:270])]
    expected = head_scales(reader, texts, found.key_means)
    assert torch.equal(found.scales.keys, expected.keys)
    assert torch.equal(found.scales.values, expected.values)
    assert found.scales.values.unique().numel() > 1, "heads differ"
    fitted = {"kv_format": "fp8", "kv_calibration": str(tmp_path / "kv.json")}
    config = EngineConfig.of(**options, **fitted, num_pages=100, max_model_len=512)
    worker, _ = build_worker(config, lambda phase: None)
    for i, layer in enumerate(worker._runner._model.attention_layers()):
        assert isinstance(layer.kv, Paged)
        assert layer.kv.scales is not None
        assert layer.kv.scales.name == found.scales.layer(i).name
    worker.close()


def test_a_format_above_its_limit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(tmp_path, "--limit", "1e-9") == 1
    assert "take a format of more bits" in capsys.readouterr().err
    assert not (tmp_path / "kv.json").exists()


def test_layers_of_eight_bits_are_those_that_the_limit_needs(tmp_path: Path) -> None:
    assert calibrate(tmp_path, "--limit", "10") == 0
    assert calibrate(tmp_path, "--limit", "10", kv_format="auto") == 1
    assert calibrate(tmp_path, "--limit", "nan") == 1
    assert calibrate(tmp_path, "--length", "0") == 1
    assert calibrate(tmp_path, "--kv-boundary-layers", "1") == 1
    means = Calibration.parse((tmp_path / "kv.json").read_text()).key_means
    from kernels.kv.presets import layer_formats

    layers, heads, dim = means.shape
    fitted = Calibration("k4v2h", (layers - 1,), means, Balance.nothing(means.shape))
    forms = layer_formats("k4v2h", layers, heads, 16, dim, None, fitted)
    assert all(isinstance(form, Paged) and form.key_mean is not None for form in forms)
    assert [form.name.startswith("a8") for form in forms] == [False] * (layers - 1) + [True]


def test_prompts_are_text_or_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert prompts_of(tmp_path / "a.txt") == ["one\n\ntwo"]
    lines = [json.dumps({"prompt": text}) for text in ("one", "two")]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    assert prompts_of(tmp_path / "b.jsonl") == ["one", "two"]
    (tmp_path / "c.jsonl").write_text(lines[0] + "\n{}")
    with pytest.raises(ValueError, match="line 2"):
        prompts_of(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        prompts_of(tmp_path / "nowhere.txt")


def test_pieces_are_as_long_as_asked_and_no_more_than_asked() -> None:
    texts = ["a" * 700, "b", "c" * 100]
    found = pieces(texts, lambda text: [ord(c) for c in text], 300, 750)
    assert [len(piece) for piece in found] == [300, 300, 100, 50]
    with pytest.raises(ValueError, match="fewer than 256"):
        pieces(["a" * 100], lambda text: [1] * len(text), 300, 750)


def test_the_comparison_is_printed_by_layer_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plots" / "kv.svg"
    assert calibrate(tmp_path, "--limit", "10", "--plot", str(plot)) == 0
    shown = capsys.readouterr().out
    assert "by layer, weighted by attention" in shown
    assert "logit error" in shown
    drawn = plot.read_text()
    for name in NAMES:
        assert f"<!-- {name} -->" in drawn


def test_a_plot_without_matplotlib_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cli.plots", None)
    assert calibrate(tmp_path, "--plot", str(tmp_path / "kv.svg")) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("kv_format", ["turbo4", "oscar2"])
def test_formats_that_native_code_does_not_read_are_fitted_in_plain_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kv_format: str
) -> None:
    compiled = ("--compile", "--cache-dir", CACHE, "--limit", "10")
    assert calibrate(tmp_path, *compiled, kv_format=kv_format) == 0
    assert "left out" not in capsys.readouterr().out
