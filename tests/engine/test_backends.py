"""Which operators a start takes, and the sentences where it cannot. The GPU is pretended."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.backends import _layers, choose_backend
from engine.config import DeviceConfig
from engine.errors import StartupError
from kernels import flashinfer
from kernels.flashinfer import FlashInferAttention
from kernels.torch_ops import TorchOps
from models.spec import ModelSpec
from tests.engine.test_build import build, by_transformers, greedy
from tests.models.checkpoints import SIZES, save
from worker.device import Device

triton = pytest.importorskip("triton")
from kernels.sampling import choose_triton  # noqa: E402
from kernels.triton_ops import TritonOps  # noqa: E402

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"
)
SPEC = ModelSpec.from_hf({**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})


def choose(kind: str, asked: str = "auto", **options: Any):
    device = Device(torch.device(kind), kind, 1 << 30, None, 256)
    return choose_backend(DeviceConfig(attention_backend=asked, **options), device, 16)


def flashinfer_says(monkeypatch: pytest.MonkeyPatch, said: object) -> None:
    monkeypatch.setattr(flashinfer, "probe", lambda *_: said)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else found(name)
    )


def test_on_a_gpu_triton_with_flashinfer_for_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer_says(monkeypatch, FlashInferAttention(None, torch.device("cpu")))
    for asked, name, capturable in (
        ("auto", "triton, flashinfer for prompts", True),
        ("flashinfer", "triton, flashinfer", False),
        ("triton", "triton", True),
    ):
        backend = choose("cuda", asked)
        ops = backend.ops(SPEC, torch.bfloat16)
        assert isinstance(ops, TritonOps)
        assert (ops.name, ops.captures(_layers(SPEC)[0])) == (name, capturable)
        assert backend.draw is choose_triton
        assert not backend.native


def test_without_flashinfer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flashinfer_says(monkeypatch, "FlashInfer is not installed")
    with caplog.at_level(logging.INFO):
        assert choose("cuda").ops(SPEC, torch.bfloat16).name == "triton"
    assert "by Triton kernels alone: FlashInfer is not installed" in caplog.text
    with pytest.raises(StartupError, match=r"flashinfer was asked for, but FlashInfer is not inst"):
        choose("cuda", "flashinfer").ops(SPEC, torch.bfloat16)


@pytest.mark.usefixtures("no_triton")
def test_without_triton(caplog: pytest.LogCaptureFixture) -> None:
    backend = choose("cuda")
    assert isinstance(backend.ops(SPEC, torch.bfloat16), TorchOps)
    assert backend.draw is None
    assert "slower: Triton is not installed" in caplog.text
    for asked in ("triton", "flashinfer"):
        with pytest.raises(StartupError, match=f"{asked} was asked for, but Triton is not instal"):
            choose("cuda", asked)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_deterministic_is_torchs(kind: str) -> None:
    assert isinstance(choose(kind, deterministic=True).ops(SPEC, torch.float32), TorchOps)
    for asked in ("triton", "flashinfer"):
        with pytest.raises(StartupError, match="depends on the batch"):
            choose(kind, asked, deterministic=True)


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("cpu").native
    assert not choose("cpu", "torch").native
    assert isinstance(choose("cpu", "torch").ops(SPEC, torch.float32), TorchOps)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for asked in ("triton", "flashinfer"):
        with pytest.raises(StartupError, match=f"{asked} was asked for, but the device is a CPU"):
            choose("cpu", asked)


@interpreted
def test_flashinfer_on_a_cpu() -> None:
    with pytest.raises(StartupError, match="flashinfer was asked for, but FlashInfer needs a CUDA"):
        choose("cpu", "flashinfer").ops(SPEC, torch.bfloat16)


@interpreted
def test_a_worker_by_triton_kernels_writes_what_transformers_does(tmp_path: Path) -> None:
    save(tmp_path, "qwen3")
    worker, limits = build(tmp_path, attention_backend="triton")
    try:
        assert worker._runner.name == "triton"
        assert worker._sampler._form is choose_triton
        assert greedy(worker, limits) == by_transformers(tmp_path)
    finally:
        worker.close()
