"""Models of real shapes, made where they are measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from makers.enlarge import SHAPES, Size, enlarge
from models.spec import ModelSpec

PROJECT = Path(__file__).resolve().parent.parent
DEMO = PROJECT / "assets" / "demo"

# Configurations as the models' cards have them; their weights are drawn at random (load_format
# dummy), which costs what the real ones cost.
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    },
    "qwen3-30b-a3b": {
        **_QWEN3,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
}
# What a dry run makes of each.
_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "torch_dtype": "float32",
}
_TINY_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_TINY_PAIR = (Size(512, 7, 16, 4, 1024, 5000), Size(384, 4, 8, 4, 512, 5000))


@dataclass(frozen=True, slots=True)
class Models:
    """A folder of checkpoints, filled as they are asked for."""

    folder: Path
    dry: bool

    def random(self, name: str, **changes: object) -> Path:
        """A checkpoint without weights, for load_format dummy."""
        config = CONFIGS[name] | changes
        if self.dry:
            config |= _TINY | (_TINY_MOE if "num_experts" in config else {})
        out = self.folder / "-".join([name, *(f"{key}-{value}" for key, value in changes.items())])
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(config))
        return out

    def pair(self, device: str) -> tuple[Path, Path]:
        """The bundled target and draft model, enlarged to the shapes of Qwen3-8B and Qwen3-0.6B."""
        sizes = _TINY_PAIR if self.dry else (SHAPES["qwen3-8b"], SHAPES["qwen3-0.6b"])
        made = []
        for name, size in zip(("target", "draft"), sizes, strict=True):
            out = self.folder / f"enlarged-{name}"
            if not out.exists():
                dtype = "float32" if self.dry else "bfloat16"
                enlarge(DEMO / name, out, size, dtype=dtype, device=device)
            made.append(out)
        return made[0], made[1]


def parameters_read(spec: ModelSpec) -> int:
    """Numbers of weights that a decode step of one row reads: all but the input embedding, and the
    experts of one token."""
    attention = spec.hidden_size * spec.head_dim * 2 * (spec.num_heads + spec.num_kv_heads)
    total = 0
    for layer in range(spec.num_layers):
        width = spec.intermediate_size
        if spec.moe is not None and layer in spec.moe.layers:
            width = spec.moe.top_k * spec.moe.intermediate_size
            total += spec.hidden_size * spec.moe.num_experts
        total += attention + 3 * spec.hidden_size * width + 2 * spec.hidden_size
    return total + spec.hidden_size * spec.vocab_size


def kv_numbers(spec: ModelSpec) -> int:
    """Numbers of keys and values of one position."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim


def prefill_operations(spec: ModelSpec, tokens: int) -> float:
    """Multiplications and additions of a prompt: of the layers, and of causal attention; the head
    is computed for one position."""
    head = spec.hidden_size * spec.vocab_size
    products = 2 * (parameters_read(spec) - head) * tokens + 2 * head
    scores = 2 * 2 * tokens * (tokens + 1) // 2 * spec.num_heads * spec.head_dim
    return float(products + scores * spec.num_layers)
