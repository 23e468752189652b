"""What the real builder refuses is one sentence; the scripted tests carry it on to the user."""

from __future__ import annotations

import json
import shutil

import pytest

from cli.config import PROJECT
from engine.build import build_worker
from engine.config import EngineConfig
from engine.errors import StartupError
from engine.process import facts_of

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


def test_unknown_drafter():
    said = refusal(DRAFT, drafters=("suffix", "oracle"))
    assert said == "there is no drafter 'oracle'; there are suffix, lookup, recycling, model."


def test_no_folder_of_a_draft_model():
    said = refusal(DRAFT, draft_model="/nowhere/draft")
    assert said == "the draft model: there is no folder /nowhere/draft."


def test_draft_model_that_nobody_asks():
    said = refusal(DRAFT, draft_model=str(DRAFT), drafters=("suffix",))
    assert said == "a draft_model is given, but `model` is not among the drafters."


def test_draft_model_with_another_tokenizer(checkpoint):
    file = checkpoint / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]  # same size, same words
    file.write_text(json.dumps(tokenizer))
    said = refusal(DRAFT, draft_model=str(checkpoint))
    assert "has another tokenizer than the target" in said


def test_draft_model_without_a_tokenizer(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    assert "model has no tokenizer.json" in refusal(DRAFT, draft_model=str(checkpoint))


@pytest.mark.parametrize(
    ("options", "there"),
    [
        ({}, ("suffix",)),
        ({"draft_model": str(DRAFT)}, ("suffix", "model")),
        ({"drafters": ("lookup", "suffix")}, ("lookup", "suffix")),
        ({"drafters": ()}, ()),
    ],
)
def test_clients_are_told_which_drafters_there_are(options, there):
    config = EngineConfig.of(
        model=str(DRAFT), device="cpu", compile=False, num_pages=600, **options
    )
    worker, limits = build_worker(config, lambda phase: None)
    try:
        assert facts_of(worker, limits).drafters == there
    finally:
        worker.close()


def test_pool_too_small_for_one_sequence():
    assert "one sequence of max_model_len 8,192 needs" in refusal(DRAFT, num_pages=4)


def test_context_longer_than_the_checkpoint():
    assert "99,999 is not between" in refusal(DRAFT, max_model_len=99_999)
