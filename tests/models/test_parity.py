"""Logits equal to those of the transformers library, for every native architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.linear.prepare import prepare_linears
from models.loader import load_decoder
from tests.models.checkpoints import Paged, expected_logits, save

MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
CASES = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-multi-head-tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 20}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "sliding_window": 20}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen3-window": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3-moe": ("qwen3_moe", MOE),
    "qwen3-moe-mixed": (
        "qwen3_moe",
        MOE | {"decoder_sparse_step": 2, "norm_topk_prob": False, "num_experts_per_tok": 3},
    ),
    "qwen3-moe-plain-layer": ("qwen3_moe", MOE | {"mlp_only_layers": [1]}),
}
LENGTHS = (70, 33, 9)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    """Three prompts cut into chunks, then decoded together token by token, on shuffled pages."""
    model_type, changes = CASES[case]
    model = save(tmp_path, model_type, **changes)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    g = torch.Generator().manual_seed(5)
    sequences = [torch.randint(3, 101, (n,), generator=g) for n in LENGTHS]
    expected = [expected_logits(model, ids) for ids in sequences]
    paged = Paged(decoder, sequences)
    steps = [
        [(0, 0, 40)],
        [(1, 0, 25), (0, 40, 60), (2, 0, 1)],
        [(2, 1, 3), (0, 60, 64), (1, 25, 28)],
        *[[(0, 64 + i, 65 + i), (1, 28 + i, 29 + i), (2, 3 + i, 4 + i)] for i in range(5)],
    ]
    for spans in steps:
        for (row, start, stop), found in zip(spans, paged.step(spans), strict=True):
            torch.testing.assert_close(found, expected[row][start:stop], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("case", ["qwen3", "qwen2", "qwen3-moe"])
def test_invariant_linears_make_decoding_bitwise(case: str, tmp_path: Path) -> None:
    """One whole prompt, and the same tokens one by one beside strangers: the same bits."""
    model_type, changes = CASES[case]
    save(tmp_path, model_type, **changes)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    if prepare_linears(decoder, "invariant") != "invariant":
        pytest.skip("no oneDNN in this build of torch")
    g = torch.Generator().manual_seed(6)
    sequences = [torch.randint(3, 101, (n,), generator=g) for n in (40, 60)]
    whole = Paged(decoder, sequences).step([(0, 0, 40)])[0]
    paged = Paged(decoder, sequences)
    found = [paged.step([(1, 0, 30), (0, 0, 7)])[1], paged.step([(0, 7, 20)])[0]]
    found += [paged.step([(0, i, i + 1), (1, i + 10, i + 11)])[0] for i in range(20, 40)]
    assert torch.equal(torch.cat(found), whole)


def test_packed_bf16_stays_close(tmp_path: Path) -> None:
    """bf16 differs from fp32 by rounding: a few percent of the logits' spread."""
    model = save(tmp_path, "qwen3", tie_word_embeddings=True)
    decoder = load_decoder(tmp_path, dtype=torch.bfloat16)
    prepare_linears(decoder, "packed")
    ids = torch.randint(3, 101, (60,), generator=torch.Generator().manual_seed(1))
    expected = expected_logits(model, ids)
    found = Paged(decoder, [ids]).step([(0, 0, 60)])[0]
    assert found.dtype == torch.float32
    assert (found - expected).std() < 0.05 * expected.std()
