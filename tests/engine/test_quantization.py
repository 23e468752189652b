"""A server of every weight format: the same text in torch and native code, and less memory."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from engine.errors import StartupError
from kernels.cpu.ops import NativeOps
from kernels.linear.invariant import InvariantLinear
from kernels.linear.quantized import QuantizedLinear
from models.quantization.save import quantize_checkpoint
from tests.engine.test_build import CACHE, build, greedy
from tests.models.checkpoints import save

FORMATS = ["int8", "int6", "int4", "fp8"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_serves_the_same_text_from_memory_and_from_disk(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And with the native kernels, which do the rest of the model."""
    save(tmp_path / "dense", "qwen3")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "small", name)
    caplog.set_level(logging.INFO, logger="engine")
    expected = greedy(*build(tmp_path / "dense", quantization=name))
    assert caplog.text.count("unpacked by plain torch operations") == 1
    assert greedy(*build(tmp_path / "small")) == expected
    native, limits = build(tmp_path / "small", compile=True, deterministic=True, cache_dir=CACHE)
    assert native._runner.name == NativeOps.name
    assert greedy(native, limits)[:4] == expected[:4]


def test_experts_in_few_bits(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    save(tmp_path, "qwen3_moe", **sizes)
    assert len(greedy(*build(tmp_path, quantization="int4"))) == 12


def test_pages_of_other_weights_have_other_hashes(tmp_path: Path) -> None:
    save(tmp_path, "qwen3")
    roots = {build(tmp_path, quantization=name)[1].hash_root for name in ("none", *FORMATS)}
    assert len(roots) == 5


def test_deterministic_serving_isolates_rows(tmp_path: Path) -> None:
    save(tmp_path, "qwen3")
    worker, _ = build(tmp_path, quantization="int8", deterministic=True)
    modules = list(worker._runner._model.modules())
    layers = [m for m in modules if isinstance(m, QuantizedLinear)]
    isolated = [m.inner for m in modules if isinstance(m, InvariantLinear)]
    assert layers
    assert all(layer in isolated for layer in layers)


def test_what_cannot_be_quantized_is_one_sentence(tmp_path: Path) -> None:
    save(tmp_path / "other", "gpt_neox", num_key_value_heads=None)
    with pytest.raises(StartupError, match="native decoders only"):
        build(tmp_path / "other", quantization="int8")
    save(tmp_path / "dense", "qwen3")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "small", "int8")
    with pytest.raises(StartupError, match="quantized already"):
        build(tmp_path / "small", quantization="int4")
