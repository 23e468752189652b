"""Architectures without a native decoder: right through the transformers library, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import transformers_fallback
from models.decoder import Decoder
from models.errors import CheckpointError, UnsupportedArchitecture
from models.loader import load_decoder, load_model, read_spec
from models.model import LanguageModel
from models.transformers_fallback import TransformersDecoder, load_fallback
from tests.models.checkpoints import Paged, expected_logits, save

RIGHT = {
    "gpt_neox": {"rotary_pct": 0.25, "num_key_value_heads": None},
    "olmo2": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": 18},
    "starcoder2": {"sliding_window": None},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2-uncapped": {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 2.0,
        "sliding_window": 18,
    },
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 0.5},
    "gpt2": {"n_positions": 512, "num_key_value_heads": None},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": None},
    "llama": {"hidden_act": "gelu"},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
REFUSED = {
    "gemma2": ({"attn_logit_softcapping": 50.0}, "softcap"),
    "bloom": ({"hidden_size": 64, "n_head": 4}, "paged"),
    "mamba": ({"intermediate_size": 128, "state_size": 8}, "linear_attention"),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, "s_aux"),
    "stablelm": ({}, "keyword arguments"),
    "llama4_text": ({}, "chunked_attention"),
}


@pytest.mark.parametrize("case", RIGHT)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    model = save(tmp_path, case.split("-")[0], **RIGHT[case])
    spec = read_spec(tmp_path)
    assert not spec.native
    decoder = load_fallback(tmp_path, dtype=torch.float32)
    g = torch.Generator().manual_seed(5)
    sequences = [torch.randint(3, 101, (n,), generator=g) for n in (50, 23)]
    expected = [expected_logits(model, ids) for ids in sequences]
    paged = Paged(decoder, sequences)
    steps = [
        [(0, 0, 30)],
        [(1, 0, 15), (0, 30, 45)],
        *[[(0, 45 + i, 46 + i), (1, 15 + i, 16 + i)] for i in range(5)],
    ]
    for spans in steps:
        for (row, start, stop), found in zip(spans, paged.step(spans), strict=True):
            torch.testing.assert_close(found, expected[row][start:stop], atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    changes, words = REFUSED[case]
    save(tmp_path, case, **changes)
    with pytest.raises(UnsupportedArchitecture, match=words) as caught:
        load_fallback(tmp_path, dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_a_wrong_attention_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial at loading compares with the library's own attention, windows included."""
    save(tmp_path, "olmo2")
    right = transformers_fallback.PagedStep.attend

    def scaled(self, layer, q, k, v, scale, window):
        return right(self, layer, q, k, v, scale * 0.9, window)

    monkeypatch.setattr(transformers_fallback.PagedStep, "attend", scaled)
    with pytest.raises(UnsupportedArchitecture, match="gives other logits"):
        load_fallback(tmp_path, dtype=torch.float32)


def test_bf16_and_dummy_weights(tmp_path: Path) -> None:
    save(tmp_path, "gpt_neox", num_key_value_heads=4)
    for form in ("safetensors", "dummy"):
        decoder = load_fallback(tmp_path, dtype=torch.bfloat16, load_format=form)
        assert next(decoder.parameters()).dtype == torch.bfloat16
        ids = torch.arange(3, 20)
        logits = Paged(decoder, [ids]).step([(0, 0, 17)])[0]
        assert logits.shape == (17, 101)
        assert logits.isfinite().all()


def test_the_native_loader_names_the_other_way(tmp_path: Path) -> None:
    save(tmp_path, "olmo2")
    with pytest.raises(UnsupportedArchitecture, match="olmo2 has no native decoder"):
        load_decoder(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(
    ("model_type", "kind"), [("olmo2", TransformersDecoder), ("qwen3", Decoder)]
)
def test_one_loader_for_both(model_type: str, kind: type, tmp_path: Path) -> None:
    model = save(tmp_path, model_type)
    loaded: LanguageModel = load_model(tmp_path, dtype=torch.float32)
    assert type(loaded) is kind
    ids = torch.arange(3, 20)
    found = Paged(loaded, [ids]).step([(0, 0, 17)])[0]
    torch.testing.assert_close(found, expected_logits(model, ids), atol=3e-4, rtol=3e-4)


def test_missing_tensors(tmp_path: Path) -> None:
    save(tmp_path, "olmo2")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_fallback(tmp_path, dtype=torch.float32)


def test_pickled_weights(tmp_path: Path) -> None:
    save(tmp_path, "olmo2")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot run code"):
        load_fallback(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Olmo2ForSequenceClassification"]}, "not a causal language model"),
        ({"model_type": "from-the-future", "architectures": ["FutureForCausalLM"]}, "Future"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
    ],
)
def test_configurations_nobody_runs(tmp_path: Path, changes: dict, words: str) -> None:
    save(tmp_path, "olmo2")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UnsupportedArchitecture, match=words) as caught:
        read_spec(tmp_path)
    assert "\n" not in str(caught.value)


def test_longrope_is_kept_to_its_original_length(tmp_path: Path) -> None:
    """The library turns all positions differently beyond it, those in the cache included."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    original = {"original_max_position_embeddings": 128}
    save(tmp_path, "phi3", sliding_window=None, rope_parameters=rope, **original)
    assert read_spec(tmp_path).max_position == 128
