"""Past output lengths survive a restart."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.history import history_file, keep, restore
from engine.scheduling import build_scheduler, keep_history
from scheduler.request import SchedulerConfig

LIMITS = SchedulerConfig(num_pages=10)


def a_config(folder: Path, **fields) -> EngineConfig:
    return EngineConfig.of(cache_dir=str(folder), model="some/model", **fields)


def test_the_next_start_is_warm(tmp_path: Path) -> None:
    first = build_scheduler(a_config(tmp_path), LIMITS)
    assert first.policy.window is not None
    for length in (10, 20, 30):
        first.policy.window.add(length, cut_short=False)
    keep_history(a_config(tmp_path), first)
    second = build_scheduler(a_config(tmp_path), LIMITS)
    assert second.policy.window is not None
    assert second.policy.window.state() == first.policy.window.state()
    assert list(tmp_path.rglob("*.json")) == [history_file(a_config(tmp_path))], "nothing else"


def test_models_do_not_share_a_past(tmp_path: Path) -> None:
    others = EngineConfig.of(cache_dir=str(tmp_path), model="other/model")
    assert history_file(others) != history_file(a_config(tmp_path))
    assert history_file(a_config(tmp_path, length_history="here.json")) == Path("here.json")
    assert history_file(EngineConfig.of(model="some/model")) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1, "lengths": 3}', "\0"])
def test_a_broken_file_costs_the_past_and_not_the_start(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = history_file(a_config(tmp_path))
    assert file is not None
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with caplog.at_level(logging.WARNING):
        scheduler = build_scheduler(a_config(tmp_path), LIMITS)
    assert "ignored" in caplog.text
    window = scheduler.policy.window
    assert window is not None
    assert len(window) == 0
    keep(window, file)
    restore(window, file)


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lengths").write_text("a file where a folder should be")
    scheduler = build_scheduler(a_config(tmp_path), LIMITS)
    with caplog.at_level(logging.WARNING):
        keep_history(a_config(tmp_path), scheduler)
    assert "cannot be kept" in caplog.text


def test_policies_without_a_past_keep_none(tmp_path: Path) -> None:
    config = a_config(tmp_path, policy="aggressive")
    keep_history(config, build_scheduler(config, LIMITS))
    assert not list(tmp_path.iterdir())
