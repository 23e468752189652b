"""What the real builder refuses is one sentence; the scripted tests carry it on to the user."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from cli.config import PROJECT
from engine.build import build_worker
from engine.config import EngineConfig
from engine.errors import StartupError
from engine.process import facts_of
from kernels.kv.balance import Balance
from kernels.kv.calibration import Calibration
from tests.models.checkpoints import save

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
    assert (
        said == "there is no drafter 'oracle'; there are suffix, lookup, recycling, model, coarse."
    )


def test_coarse_drafts_of_pages_without_halves():
    said = refusal(DRAFT, drafters=("coarse",), kv_format="int4h")
    assert said == (
        "the drafter `coarse` reads the upper halves of 8-bit pages: serve with --kv-format int8n "
        "or k8v4."
    )


def test_two_drafters_that_compute():
    said = refusal(DRAFT, draft_model=str(DRAFT), drafters=("coarse", "model"))
    assert said == "of the drafters `model` and `coarse` only one can be used."


def test_a_head_that_a_kv_format_does_not_take(tmp_path):
    save(tmp_path, "llama")
    said = refusal(tmp_path, kv_format="int4h64")
    assert said == (
        "the KV format int4h64 does not fit this model: 16 numbers do not make groups of 64."
    )


def test_kv_formats_and_boundaries_that_are_none():
    assert "there is no KV format 'int5'" in refusal(DRAFT, kv_format="int5")
    assert "less than none" in refusal(DRAFT, kv_format="int4h", kv_boundary_layers=-1)
    assert "not dense pages" in refusal(DRAFT, kv_boundary_layers=2)


def test_a_calibration_of_something_else(tmp_path):
    file = tmp_path / "kv.json"
    assert "cannot be read" in refusal(DRAFT, kv_format="int4h", kv_calibration=str(file))
    file.write_text("{}")
    said = refusal(DRAFT, kv_format="int4h", kv_calibration=str(file))
    assert said == "this is no calibration: 'version'."
    file.write_text(
        Calibration("int8n", (), torch.zeros(2, 2, 2), Balance.nothing((2, 2, 2))).dump()
    )
    said = refusal(DRAFT, kv_format="int4h", kv_calibration=str(file))
    assert said == "the calibration is for int8n, not int4h."
    file.write_text(
        Calibration("int4h", (), torch.zeros(2, 2, 2), Balance.nothing((2, 2, 2))).dump()
    )
    assert "(2, 2, 2)" in refusal(DRAFT, kv_format="int4h", kv_calibration=str(file))


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
