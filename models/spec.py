"""`ModelSpec`: what a checkpoint's config.json says, checked and in one vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.errors import CheckpointError, UnsupportedArchitecture
from models.rope import RopeParameters

# model_type -> the architecture its checkpoints name
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture of experts in place of the MLP of some layers."""

    num_experts: int
    top_k: int
    intermediate_size: int  # of one expert
    norm_topk_prob: bool  # the chosen experts' weights are made to sum to one
    layers: frozenset[int]  # the layers that have experts


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes and switches of one decoder."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # the context the checkpoint is made for
    rope: RopeParameters
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head
    tied_embeddings: bool = False
    windows: tuple[int | None, ...] = ()  # sliding window by layer; None: full attention
    moe: MoeSpec | None = None
    dtype: str = "float32"  # of the checkpoint
    eos_token_ids: tuple[int, ...] = ()
    native: bool = True  # False: models.transformers_fallback runs it

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> ModelSpec:
        """Reads config.json and, for the end-of-sequence ids, generation_config.json.

        Raises `UnsupportedArchitecture` for what the native decoder does not compute and
        `CheckpointError` for a configuration that is not a language model's.
        """
        model_type = _check_architecture(config)
        hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
        num_layers = _count(config, "num_hidden_layers")
        kv_heads = _count(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json has {heads} attention heads, which {kv_heads} KV heads do not divide."
            )
        head_dim = _count(config, "head_dim", 128 if model_type == "qwen3" else hidden // heads)
        rope = RopeParameters.from_hf(config)
        if rope.scaling == "longrope" and not (
            len(rope.short_factor) == len(rope.long_factor) == head_dim // 2
        ):
            raise CheckpointError(
                f"config.json's LongRoPE factors are not {head_dim // 2} numbers each."
            )
        attention_bias = bool(config.get("attention_bias", False))
        eos = (generation or {}).get("eos_token_id")
        if eos is None:
            eos = config.get("eos_token_id")
        if eos is None:
            eos = ()
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        return cls(
            model_type=model_type,
            vocab_size=_count(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_count(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position=rope.context,
            rope=rope,
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            # Qwen2 has biases on the queries, keys and values alone; the others all or none.
            qkv_bias=model_type == "qwen2" or (attention_bias and model_type != "mistral"),
            output_bias=attention_bias and model_type not in ("qwen2", "mistral"),
            mlp_bias=model_type == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=model_type in ("qwen3", "qwen3_moe"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            windows=_windows(model_type, config, num_layers),
            moe=_moe(config, num_layers) if model_type == "qwen3_moe" else None,
            dtype=dtype.removeprefix("torch."),
            eos_token_ids=(eos,) if isinstance(eos, int) else tuple(eos),
        )


def _check_architecture(config: Mapping[str, Any]) -> str:
    """The native model_type of a configuration; raises `UnsupportedArchitecture`."""
    model_type = str(config.get("model_type", ""))
    named = list(config.get("architectures") or ())
    known = ARCHITECTURES.get(model_type)
    if known is None or (named and known not in named):
        name = named[0] if named else model_type or "(config.json names none)"
        raise UnsupportedArchitecture(
            f"architecture {name} has no native decoder; there is one for "
            f"{', '.join(ARCHITECTURES.values())}."
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedArchitecture(
            f"{known} with activation {activation!r} instead of silu is not supported."
        )
    return model_type


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; an absent or null entry takes the default, if there is one."""
    value = config.get(key)
    if value is None and default is not None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json has no usable {key}: {value!r} is not a count.")
    return value


def _windows(model_type: str, config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window."""
    window = config.get("sliding_window", None if model_type == "llama" else 4096)
    # The Qwen configurations carry a window that is off unless a second entry turns it on.
    if model_type.startswith("qwen") and not config.get("use_sliding_window", False):
        window = None
    if window is None or model_type == "llama":
        return (None,) * num_layers
    window = _count(config, "sliding_window", window)
    kinds = config.get("layer_types")
    if kinds is not None:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown or len(kinds) != num_layers:
            raise UnsupportedArchitecture(
                f"layer types {sorted(set(kinds))} for {num_layers} layers are not supported."
            )
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if model_type in ("qwen2", "qwen3"):
        full = config.get("max_window_layers")
        full = 28 if full is None else int(full)
        return tuple(window if i >= full else None for i in range(num_layers))
    return (window,) * num_layers


def _moe(config: Mapping[str, Any], num_layers: int) -> MoeSpec:
    num_experts = int(config.get("num_experts", config.get("num_local_experts")) or 0)
    step = int(config.get("decoder_sparse_step", 1))
    plain = set(config.get("mlp_only_layers") or ())
    layers = frozenset(
        i for i in range(num_layers) if num_experts > 0 and i not in plain and (i + 1) % step == 0
    )
    return MoeSpec(
        num_experts=num_experts,
        top_k=_count(config, "num_experts_per_tok"),
        intermediate_size=_count(config, "moe_intermediate_size"),
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
        layers=layers,
    )
