"""What the real builder refuses is one sentence; the scripted tests carry it on to the user."""

from __future__ import annotations

import json
import shutil

import pytest

from cli.config import PROJECT
from engine.build import build_worker
from engine.config import EngineConfig
from engine.errors import StartupError

DRAFT = PROJECT / "assets" / "demo" / "draft"


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the bundled draft model, to be spoilt."""
    return shutil.copytree(DRAFT, tmp_path / "model")


def refusal(model, **options) -> str:
    config = EngineConfig.of(model=str(model), device="cpu", compile=False, **options)
    with pytest.raises(StartupError) as error:
        build_worker(config, lambda phase: None)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_folder():
    assert refusal("/nowhere/model") == "there is no folder /nowhere/model."


def test_empty_folder(tmp_path):
    assert "has no config.json" in refusal(tmp_path)


def test_damaged_weights(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "is damaged or incomplete" in refusal(checkpoint)


def test_missing_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "has no safetensors file" in refusal(checkpoint)


def test_unknown_architecture(checkpoint):
    config = checkpoint / "config.json"
    fields = json.loads(config.read_text())
    fields |= {"architectures": ["NoSuchModel"], "model_type": "no_such_model"}
    config.write_text(json.dumps(fields))
    assert "NoSuchModel" in refusal(checkpoint)


def test_pool_too_small_for_one_sequence():
    assert "one sequence of max_model_len 8,192 needs" in refusal(DRAFT, num_pages=4)


def test_context_longer_than_the_checkpoint():
    assert "99,999 is not between" in refusal(DRAFT, max_model_len=99_999)
