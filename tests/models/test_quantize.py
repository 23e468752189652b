"""Dense checkpoints rounded when they are loaded, and written in few bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kernels.linear.dense import DenseLinear
from kernels.linear.quantized import QuantizedLinear
from models.decoder import Decoder
from models.errors import CheckpointError
from models.loader import load_decoder, load_model
from models.quantization.load import META, DummyTensors
from models.quantization.save import quantize_checkpoint
from tests.models.checkpoints import Paged, expected_logits, save

FORMATS = ["int8", "int6", "int4", "fp8"]
IDS = torch.arange(3, 40)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def logits(folder: Path, quantization: str = "none", **options) -> Tensor:
    decoder = load_decoder(folder, dtype=torch.float32, quantization=quantization, **options)
    return Paged(decoder, [IDS]).step([(0, 0, len(IDS))])[0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3_moe"])
def test_written_and_rounded_when_loaded_are_the_same(
    name: str, model_type: str, tmp_path: Path
) -> None:
    changes = EXPERTS if model_type == "qwen3_moe" else {}
    dense, small = tmp_path / "dense", tmp_path / "small"
    save(dense, model_type, tie_word_embeddings=False, **changes)
    (dense / "tokenizer.json").write_text("{}")
    (dense / "optimizer.bin").write_text("no part of a checkpoint")
    quantize_checkpoint(dense, small, name)
    on_the_fly = logits(dense, name)
    assert torch.equal(logits(small), on_the_fly)
    off = (on_the_fly - logits(dense)).abs().max() / on_the_fly.abs().max()
    assert 0 < off < {"int8": 0.5, "int6": 1.0, "int4": 2.0, "fp8": 1.0}[name]
    assert (small / "tokenizer.json").exists()
    assert not (small / "optimizer.bin").exists()
    assert not small.with_name("small.partial").exists()


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_experts_give_what_transformers_computes_of_the_same_numbers(
    name: str, bits: int, tmp_path: Path
) -> None:
    """The codes as they were written, read here once more, in the library's dense model."""
    dense, small = tmp_path / "dense", tmp_path / "small"
    save(dense, "qwen3_moe", tie_word_embeddings=False, **EXPERTS)
    quantize_checkpoint(dense, small, name)
    tensors, written = (load_file(at / "model.safetensors") for at in (dense, small))
    for part in [part for part in written if part.endswith("_packed")]:
        scales = written[part.replace("packed", "scale")].float()
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        codes = (written[part][..., None] >> shifts) & ((1 << bits) - 1)
        numbers = codes.view(*scales.shape, -1) - (1 << bits - 1)
        tensors[part.removesuffix("_packed")] = (numbers * scales[..., None]).flatten(1)
    save_file(tensors, dense / "model.safetensors")
    library = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(small), expected_logits(library, IDS), atol=2e-4, rtol=2e-4)


def test_more_bits_are_nearer(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    dense = logits(tmp_path)
    off = {name: float((logits(tmp_path, name) - dense).square().mean()) for name in FORMATS}
    assert off["int8"] < off["int6"] < off["int4"]
    assert off["int8"] < off["fp8"] < off["int4"]


@pytest.mark.parametrize("name", FORMATS)
def test_shards_stay_shards(name: str, tmp_path: Path) -> None:
    dense, small = tmp_path / "dense", tmp_path / "small"
    save(dense, "qwen3", shard_size="60KB", tie_word_embeddings=True)
    written = quantize_checkpoint(dense, small, name)
    assert torch.equal(logits(small), logits(dense, name))
    index = json.loads((small / "model.safetensors.index.json").read_text())
    for tensor, file in index["weight_map"].items():
        with safe_open(small / file, framework="pt") as opened:
            assert tensor in opened.keys()  # noqa: SIM118
    sizes = sum(path.stat().st_size for path in small.glob("*.safetensors"))
    assert written.after <= sizes < written.after * 1.2
    assert index["metadata"]["total_size"] == written.after < written.before / 2


def test_what_the_configuration_of_the_written_says(tmp_path: Path) -> None:
    save(tmp_path / "dense", "qwen3_moe", tie_word_embeddings=True, **EXPERTS)
    for name in FORMATS:
        quantize_checkpoint(tmp_path / "dense", tmp_path / name, name)
    found = {
        name: json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in FORMATS
    }
    ignored = ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(3))]
    assert all(config["ignore"] == ignored for config in found.values())
    assert found["int6"]["quant_method"] == "foresight"
    formats = [found[name]["format"] for name in ("int8", "int4", "fp8")]
    assert formats == ["pack-quantized", "pack-quantized", "float-quantized"]
    weights = found["int4"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (4, 32)


@pytest.mark.parametrize("tied", [True, False])
def test_which_layers_are_rounded(tied: bool, tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe", tie_word_embeddings=tied, **EXPERTS)
    decoder = load_decoder(tmp_path, dtype=torch.float32, quantization="int4")
    dense = [name for name, m in decoder.named_modules() if isinstance(m, DenseLinear)]
    assert dense == [*(f"layers.{i}.mlp.router" for i in range(3)), "head"]
    assert isinstance(decoder.layers[0].attention.qkv, QuantizedLinear)
    assert (decoder.head.weight is decoder.embedding) == tied
    assert not any(tensor.is_meta for tensor in [*decoder.parameters(), *decoder.buffers()])


def test_one_matrix_at_a_time_is_there_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a layer is read, those before it are in few bits already."""
    save(tmp_path, "llama", tie_word_embeddings=False)
    seen: list[int] = []

    def watched(self, name):
        layers = self.decoder.modules()
        held = [m for m in layers if isinstance(m, DenseLinear) and not m.weight.is_meta]
        seen.append(len(held))
        return take(self, name)

    take = DummyTensors.take
    start = DummyTensors.__init__

    def keep(self, decoder, seed):
        self.decoder = decoder
        start(self, decoder, seed)

    monkeypatch.setattr(DummyTensors, "__init__", keep)
    monkeypatch.setattr(DummyTensors, "take", watched)
    load_decoder(tmp_path, dtype=torch.float32, quantization="int8", load_format="dummy")
    assert len(seen) > 20
    assert max(seen) <= 1, "the head alone"


def test_random_weights_are_those_of_a_dense_model(tmp_path: Path) -> None:
    save(tmp_path, "qwen3")
    (tmp_path / "model.safetensors").unlink()
    rounded, dense = (
        logits(tmp_path, "int8", load_format="dummy"),
        logits(tmp_path, load_format="dummy"),
    )
    torch.testing.assert_close(rounded, dense, atol=0.02, rtol=0.1)


def test_what_is_rounded_is_the_checkpoints_numbers(tmp_path: Path) -> None:
    """Whatever the arithmetic is in: the codes are the same."""
    save(tmp_path, "llama")
    one, other = (
        load_decoder(tmp_path, dtype=dtype, quantization="int4").layers[0].mlp.down
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(one.weight.planes[0], other.weight.planes[0])
    assert torch.equal(one.weight.scales, other.weight.scales)


def refused(words: str, folder: Path, name: str, **options) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(folder, dtype=torch.float32, quantization=name, **options)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_rounded(tmp_path: Path) -> None:
    save(tmp_path / "odd", "llama", intermediate_size=40)
    refused("quantized to int4: 40 inputs are not whole groups of 32", tmp_path / "odd", "int4")
    refused("'int5' is not one of int8, int6, int4, fp8", tmp_path / "odd", "int5")
    save(tmp_path / "other", "gpt_neox", num_key_value_heads=None)
    refused("native decoders only", tmp_path / "other", "int8")
    with pytest.raises(CheckpointError, match="no native decoder"):
        quantize_checkpoint(tmp_path / "other", tmp_path / "out", "int8")
    save(tmp_path / "dense", "llama")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "small", "int8")
    refused("quantized already", tmp_path / "small", "int8")
    refused("random weights are dense", tmp_path / "small", "none", load_format="dummy")
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(tmp_path / "small", tmp_path / "again", "int8")
    with pytest.raises(CheckpointError, match="exists already"):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "small", "int8")
    assert not (tmp_path / "again").exists()


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path / "dense", "llama", shard_size="60KB")
    path = sorted((tmp_path / "dense").glob("model-*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "small", "int8")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_the_decoder_on_the_meta_device_takes_no_memory(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    from models.loader import read_spec

    decoder = Decoder(read_spec(tmp_path), device=META)
    assert all(parameter.is_meta for parameter in decoder.parameters())
