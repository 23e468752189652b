"""`foresight quantize` on the bundled draft model, and what serving does with the folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cli.config import PROJECT
from cli.main import main
from cli.quantize import MODULES, TOPICS, texts_of
from engine.build import build_worker
from engine.config import EngineConfig
from makers import demo_data

DRAFT = PROJECT / "assets" / "demo" / "draft"


def quantize(output: Path, *more: str, form: str = "int8") -> int:
    return main(
        [
            *("quantize", str(DRAFT), str(output), "--format", form),
            *("--device", "cpu", "--dtype", "float32", "--no-compile", "--tokens", "300"),
            *more,
        ]
    )


@pytest.mark.parametrize(("form", "least"), [("int8", 97.0), ("int4", 60.0)])
def test_a_checkpoint_is_written_measured_and_served(
    form: str, least: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tmp_path / "small", form=form) == 0
    shown = capsys.readouterr().out
    assert f"{form}" in shown
    agreed = re.search(r"([\d.]+)%[^%]*$", shown)
    assert agreed is not None
    assert least <= float(agreed[1]) < 100.0 or form == "int8"
    config = EngineConfig.of(
        model=str(tmp_path / "small"),
        device="cpu",
        compile=False,
        num_pages=100,
        max_model_len=512,
    )
    worker, _ = build_worker(config, lambda phase: None)
    worker.close()


def test_prompts_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(Path(__file__).read_text())
    assert quantize(tmp_path / "small", "--prompts", str(prompts), "--length", "100") == 0
    assert "300 tokens in 3 pieces" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prompts", "nowhere.txt"], "cannot be read"),
        (["--length", "1"], "must be at least 2"),
        (["-q", "int8"], "say --format instead"),
        (["--load-format", "dummy"], "no weights to write"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tmp_path / "small", *more) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(tmp_path) == 1
    assert "exists already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_text_is_what_the_bundled_models_have_not_seen() -> None:
    assert TOPICS == demo_data.HELD_OUT_TOPICS
    assert MODULES == demo_data.HELD_OUT_FILES
    assert sum(map(len, texts_of(None))) > 20_000
