"""What a config.json becomes, or why it is refused."""

from __future__ import annotations

import pytest

from models.errors import CheckpointError, UnsupportedArchitecture
from models.spec import ModelSpec

BASE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
}


def of_type(model_type: str, **changes) -> dict:
    config = {**BASE, "model_type": model_type, **changes}
    config.pop("architectures")
    return config


def test_sizes() -> None:
    spec = ModelSpec.from_hf(BASE)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 2, 16)
    assert (spec.max_position, spec.rope.theta, spec.dtype) == (1024, 1e6, "bfloat16")
    assert spec.qk_norm
    assert not spec.qkv_bias
    assert spec.windows == (None,) * 4
    assert spec.moe is None


def test_newer_spelling_is_the_same_spec() -> None:
    newer = {k: v for k, v in BASE.items() if k not in ("rope_theta", "torch_dtype")}
    newer |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "dtype": "bfloat16"}
    assert ModelSpec.from_hf(newer) == ModelSpec.from_hf(BASE)


def test_end_of_sequence_ids() -> None:
    assert ModelSpec.from_hf(BASE).eos_token_ids == ()
    one = {**BASE, "eos_token_id": 2}
    assert ModelSpec.from_hf(one).eos_token_ids == (2,)
    assert ModelSpec.from_hf(one, {"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    assert ModelSpec.from_hf(one, {"temperature": 0.6}).eos_token_ids == (2,)
    assert ModelSpec.from_hf(one, {"eos_token_id": None}).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (of_type("mistral", sliding_window=64), (64,) * 4),
        (of_type("mistral", sliding_window=None), (None,) * 4),
        (of_type("llama", sliding_window=64), (None,) * 4),
        (of_type("qwen2", sliding_window=64, max_window_layers=2), (None,) * 4),
        (
            of_type("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=3),
            (None, None, None, 64),
        ),
        (
            of_type("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=0),
            (64,) * 4,
        ),
        (
            of_type(
                "qwen3",
                use_sliding_window=True,
                sliding_window=64,
                layer_types=["full_attention", "sliding_attention"] * 2,
            ),
            (None, 64, None, 64),
        ),
    ],
)
def test_sliding_windows(config: dict, windows: tuple) -> None:
    assert ModelSpec.from_hf(config).windows == windows


def test_experts_by_layer() -> None:
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    spec = ModelSpec.from_hf(
        of_type("qwen3_moe", **moe, decoder_sparse_step=2, mlp_only_layers=[3])
    )
    assert spec.moe is not None
    assert spec.moe.layers == {1}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**BASE, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({**BASE, "architectures": ["Qwen3ForSequenceClassification"]}, "SequenceClassification"),
        ({}, "names none"),
        ({**BASE, "hidden_act": "gelu"}, "gelu"),
        (
            of_type(
                "qwen2", use_sliding_window=True, sliding_window=4, layer_types=["chunked"] * 4
            ),
            "chunked",
        ),
    ],
)
def test_unsupported(config: dict, words: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=words) as caught:
        ModelSpec.from_hf(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({k: v for k, v in BASE.items() if k != "hidden_size"}, "hidden_size"),
        ({**BASE, "num_hidden_layers": None}, "num_hidden_layers"),
        ({**BASE, "num_key_value_heads": 3}, "divide"),
        (of_type("mistral", sliding_window=0), "sliding_window"),
        (of_type("llama", rope_scaling={"type": "linear", "factor": "wide"}), "rotary"),
        (of_type("llama", rope_scaling={"type": "longrope", "short_factor": [1.0]}), "LongRoPE"),
        (of_type("qwen3_moe"), "num_experts_per_tok"),
    ],
)
def test_unusable(config: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        ModelSpec.from_hf(config)
