"""Frequencies and attention factors equal to the transformers library's, in both spellings."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.errors import UnsupportedArchitecture
from models.rope import RopeParameters, cos_sin_table, inverse_frequencies

DIM, LONGEST = 64, 4096
FACTORS = {
    "short_factor": [1.0 + 0.01 * i for i in range(DIM // 2)],
    "long_factor": [1.0 + 0.5 * i for i in range(DIM // 2)],
}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn-tuned": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "attention_factor": 1.25,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 1024, **FACTORS},
    "longrope-factor": {
        "rope_type": "longrope",
        "factor": 8.0,
        "original_max_position_embeddings": 1024,
        **FACTORS,
    },
}


def transformers_config(scaling: dict) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_theta": 5e5, **scaling},
    )


def ours(scaling: dict, layout: int) -> RopeParameters:
    """`layout`: the major version of transformers whose spelling is used."""
    config = {"max_position_embeddings": LONGEST}
    if layout == 5:
        return RopeParameters.from_hf({**config, "rope_parameters": {"rope_theta": 5e5, **scaling}})
    old = None if scaling["rope_type"] == "default" else scaling
    return RopeParameters.from_hf({**config, "rope_theta": 5e5, "rope_scaling": old})


@pytest.mark.parametrize("layout", [4, 5])
@pytest.mark.parametrize("length", [512, LONGEST, 2 * LONGEST])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies(name: str, length: int, layout: int) -> None:
    scaling = SCALINGS[name]
    config = transformers_config(scaling)
    if scaling["rope_type"] == "default":
        expected, factor = 1.0 / 5e5 ** (torch.arange(0, DIM, 2).float() / DIM), 1.0
    else:
        compute = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
        expected, factor = compute(config, torch.device("cpu"), seq_len=length)
    rope = ours(scaling, layout)
    torch.testing.assert_close(
        inverse_frequencies(rope, DIM, length), expected, rtol=1e-6, atol=1e-12
    )
    assert rope.attention_factor == pytest.approx(factor)


def test_table_holds_scaled_cosines_and_sines() -> None:
    rope = ours(SCALINGS["yarn-attention-factor"], 5)
    table = cos_sin_table(rope, DIM, 300)
    assert table.shape == (300, 2, DIM // 2)
    assert table.dtype == torch.float32
    angles = torch.arange(300.0)[:, None] * inverse_frequencies(rope, DIM, 300)
    torch.testing.assert_close(table[:, 0], 1.25 * angles.cos())
    torch.testing.assert_close(table[:, 1], 1.25 * angles.sin())


def test_older_names_mean_the_same() -> None:
    yarn = SCALINGS["yarn"]
    old = {k: v for k, v in yarn.items() if k != "rope_type"} | {"type": "yarn"}
    config = {"max_position_embeddings": LONGEST, "rope_theta": 5e5, "rope_scaling": old}
    assert RopeParameters.from_hf(config) == ours(yarn, 5)


def test_original_length_beside_the_parameters_wins() -> None:
    config = {
        "max_position_embeddings": LONGEST,
        "original_max_position_embeddings": 2048,
        "rope_parameters": SCALINGS["longrope"],
    }
    assert RopeParameters.from_hf(config).original_max_position == 2048


@pytest.mark.parametrize(
    ("scaling", "context"),
    [("default", LONGEST), ("linear", LONGEST), ("yarn", 4096), ("yarn-tuned", 4096)],
)
def test_context(scaling: str, context: int) -> None:
    assert ours(SCALINGS[scaling], 5).context == context


def test_yarn_extends_a_context_given_as_the_original() -> None:
    """Qwen2.5's spelling: max_position_embeddings stays the original length."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = {"max_position_embeddings": 32768, "rope_theta": 1e6, "rope_scaling": scaling}
    assert RopeParameters.from_hf(config).context == 131072


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_scaling": {"rope_type": "proportional"}}, "proportional"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "mrope"),
        ({"partial_rotary_factor": 0.5}, "partial"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer type"),
    ],
)
def test_refusals(config: dict, words: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=words):
        RopeParameters.from_hf(config)
