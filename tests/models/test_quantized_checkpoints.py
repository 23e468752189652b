"""Checkpoints in few bits give what the same numbers give densely, and others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.linear.dense import DenseLinear
from kernels.linear.quantized import QuantizedLinear, SplitLinear, parameter_count, weight_bytes
from models.decoder import Decoder
from models.errors import CheckpointError
from models.loader import load_decoder
from models.quantization.layouts import stored_layout
from tests.models import stored
from tests.models.checkpoints import Paged, save

IDS = torch.arange(3, 40)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}


def compressed(form: str, activations: dict | None = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def integers(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", **more}


FLOATS = {"num_bits": 8, "type": "float", "symmetric": True}
DYNAMIC = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}

CASES: dict[str, tuple[dict[str, Any], stored.Packer]] = {
    "awq": (AWQ, stored.awq(32)),
    "awq, a scale a row": ({**AWQ, "group_size": -1}, stored.awq(-1)),
    "gptq": (GPTQ, stored.gptq(4, 32, symmetric=True, shuffled=False)),
    "gptq, asymmetric": (
        {**GPTQ, "sym": False},
        stored.gptq(4, 32, symmetric=False, shuffled=False),
    ),
    "gptq, act-order": (
        {**GPTQ, "desc_act": True},
        stored.gptq(4, 32, symmetric=True, shuffled=True),
    ),
    "gptq, 8 bits, act-order, asymmetric": (
        {**GPTQ, "bits": 8, "desc_act": True, "sym": False},
        stored.gptq(8, 32, symmetric=False, shuffled=True),
    ),
    "gptq, 8 bits, a scale a row": (
        {**GPTQ, "bits": 8, "group_size": -1},
        stored.gptq(8, -1, symmetric=True, shuffled=False),
    ),
    "gptq_v2": (
        {**GPTQ, "checkpoint_format": "gptq_v2", "sym": False},
        stored.gptq(4, 32, symmetric=False, v2=True, shuffled=False),
    ),
    "W4A16": (
        compressed("pack-quantized", **integers(4, group_size=32)),
        stored.packed_integers(4, 32, symmetric=True),
    ),
    "W4A16, asymmetric": (
        compressed("pack-quantized", **integers(4, group_size=32) | {"symmetric": False}),
        stored.packed_integers(4, 32, symmetric=False),
    ),
    "W4A16, act-order": (
        compressed("pack-quantized", **integers(4, group_size=32, actorder="group")),
        stored.packed_integers(4, 32, symmetric=True, shuffled=True),
    ),
    "W8A16": (
        compressed("pack-quantized", **integers(8) | {"strategy": "channel"}),
        stored.packed_integers(8, None, symmetric=True),
    ),
    "W8A8, integers": (
        compressed(
            "int-quantized",
            {"num_bits": 8, "type": "int", "dynamic": True},
            **integers(8) | {"strategy": "channel"},
        ),
        stored.bytes_of_integers,
    ),
    "W8A8, fp8": (
        compressed("float-quantized", DYNAMIC, **FLOATS, strategy="channel"),
        stored.fp8(None, "weight_scale", per_row=True),
    ),
    "W8A8, fp8, one scale": (
        compressed("float-quantized", DYNAMIC, **FLOATS, strategy="tensor"),
        stored.fp8(None, "weight_scale"),
    ),
    "W8A8, fp8, blocks": (
        compressed(
            "float-quantized", DYNAMIC, **FLOATS, strategy="block", block_structure=[32, 32]
        ),
        stored.fp8(32, "weight_scale"),
    ),
    "fp8, blocks": (
        {**FP8, "weight_block_size": [128, 128]},
        stored.fp8(128, "weight_scale_inv"),
    ),
    "fp8, small blocks": (
        {**FP8, "weight_block_size": [48, 48]},  # a last one cut off
        stored.fp8(48, "weight_scale_inv"),
    ),
    "fp8, one scale": (FP8, stored.fp8(None, "weight_scale")),
}


def load(folder: Path) -> Decoder:
    return load_decoder(folder, dtype=torch.float32)


def logits(decoder: Decoder) -> Tensor:
    return Paged(decoder, [IDS]).step([(0, 0, len(IDS))])[0]


def check_alike(quantized: Path, dense: Path) -> Decoder:
    decoder = load(quantized)
    torch.testing.assert_close(logits(decoder), logits(load(dense)), atol=2e-4, rtol=2e-4)
    return decoder


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_give_the_same_logits(case: str, tmp_path: Path) -> None:
    config, pack = CASES[case]
    decoder = check_alike(*stored.write_pair(tmp_path, config, pack))
    kinds = [type(m) for m in decoder.modules() if isinstance(m, DenseLinear | QuantizedLinear)]
    assert kinds.count(QuantizedLinear) == 4 * len(decoder.layers), "all projections are fused"
    assert kinds.count(DenseLinear) == 1, "the head is dense"
    assert not any(isinstance(m, SplitLinear) for m in decoder.modules())


def test_biases_stay(tmp_path: Path) -> None:
    """Qwen2 has them on queries, keys and values; they are the original's, not GPTQ's zeros."""
    config, pack = CASES["W4A16"]
    check_alike(*stored.write_pair(tmp_path, config, pack, "qwen2"))


def test_experts_are_layers_like_others(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config, _ = CASES["W4A16"]
    pair = stored.write_pair(
        tmp_path / "pair",
        config,
        stored.packed_integers(4, 32, symmetric=True),
        "qwen3_moe",
        **sizes,
    )
    decoder = check_alike(*pair)
    assert sum(isinstance(m, QuantizedLinear) for m in decoder.modules()) == 2 * (2 + 4 * 2)


@pytest.mark.parametrize("skip", [r"layers\.1\.", r"v_proj", r"mlp"])
def test_layers_left_dense_stay_dense(skip: str, tmp_path: Path) -> None:
    """Whole layers, and one of three projections that are fused otherwise."""
    config = {**GPTQ, "modules_to_not_convert": ["whatever it says"], "dynamic": {"-:.*": {}}}
    pack = stored.gptq(4, 32, symmetric=True, shuffled=True)
    decoder = check_alike(*stored.write_pair(tmp_path, config, pack, skip=skip))
    split = [m for m in decoder.modules() if isinstance(m, SplitLinear)]
    assert len(split) == (2 if skip == "v_proj" else 0)


def test_a_quantised_head(tmp_path: Path) -> None:
    config, pack = CASES["fp8, one scale"]
    quantized, dense = stored.write_pair(tmp_path, config, pack)
    tensors, plain = (load_file(f / "model.safetensors") for f in (quantized, dense))
    head = tensors.pop("lm_head.weight").to(torch.float8_e4m3fn)
    plain["lm_head.weight"] = head.float() * 0.5
    tensors |= {"lm_head.weight": head, "lm_head.weight_scale": torch.tensor(0.5)}
    save_file(tensors, quantized / "model.safetensors")
    save_file(plain, dense / "model.safetensors")
    assert isinstance(check_alike(quantized, dense).head, QuantizedLinear)


def test_packed_weights_are_what_is_kept(tmp_path: Path) -> None:
    quantized, dense = stored.write_pair(tmp_path, *CASES["W4A16"])
    few, many = load(quantized), load(dense)
    assert parameter_count(few) == parameter_count(many)
    linears = sum(p.numel() for m in many.layers for p in m.parameters() if p.dim() == 2)
    rest = weight_bytes(many) - 4 * linears
    assert weight_bytes(few) == rest + linears // 2 + linears // 32 * 2
    assert not any(tensor.is_meta for tensor in [*few.parameters(), *few.buffers()])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**GPTQ, "bits": 3}, "GPTQ weights of 3 bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
        ({**GPTQ, "is_marlin_format": True}, "marlin"),
        ({**GPTQ, "dynamic": {"+:.*down.*": {"bits": 8}}}, "other settings for some layers"),
        ({**GPTQ, "group_size": 0}, "groups of 0 inputs"),
        ({**AWQ, "version": "gemv"}, "AWQ weights of 4 bits in version 'gemv'"),
        ({**FP8, "activation_scheme": "static"}, "static activation scales"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "foresight", "format": "int5"}, "format int5"),
        (compressed("marlin-24", **integers(4, group_size=128)), "marlin-24"),
        (compressed("pack-quantized", **integers(3, group_size=128)), "int of 3 bits"),
        (compressed("float-quantized", {"dynamic": False}, **FLOATS), "static activation scales"),
        (compressed("nvfp4-pack-quantized", **FLOATS), "nvfp4"),
        (
            {**compressed("dense"), "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask",
        ),
        ({**compressed("pack-quantized"), "config_groups": {"a": {}, "b": {}}}, "2 groups"),
    ],
)
def test_what_is_not_read(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    save(tmp_path, "llama")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    with pytest.raises(CheckpointError, match=words) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    assert "read are AWQ" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "foresight", "format": "int6"}, "foresight quantization is damaged"),
        ({**FP8, "weight_block_size": 128}, "fp8 quantization is damaged"),
        ({**compressed("pack-quantized"), "config_groups": ["a"]}, "tensors quantization is dam"),
        ("int4", "not an object"),
    ],
)
def test_damaged_configurations(config: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        stored_layout({"quantization_config": config})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.scales"), r"lacks model\.layers\.1\.mlp\.up"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.qzeros": torch.zeros(1, 2).int()}),
            r"up_proj: qzeros has shape \[1, 2\], not \[2, 12\]",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.g_idx": torch.zeros(64).int()}),
            "g_idx does not give every group 32 inputs",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(96)}),
            r"no place for: model\.layers\.0\.mlp\.up_proj\.bias",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.oddity": torch.ones(96)}),
            r"no place for: model\.layers\.0\.mlp\.oddity",
        ),
    ],
)
def test_damaged_checkpoints(change: Any, words: str, tmp_path: Path) -> None:
    quantized, _ = stored.write_pair(tmp_path, *CASES["gptq"])
    tensors = load_file(quantized / "model.safetensors")
    change(tensors)
    save_file(tensors, quantized / "model.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        load(quantized)
    assert "\n" not in str(caught.value)
