"""Any other decoder-only architecture, run by the transformers library over our paged KV.

The library computes everything but attention, which it calls through its attention interface with
the step's batch among the keyword arguments. Whether that gives what the architecture means is
not assumed but tried: when it is loaded, a model must give the same logits this way, in chunks
beside another sequence, as by the library's own attention. What needs more than paged causal
attention (convolution or recurrent state, attention sinks, ALiBi, capped scores) is refused there.

transformers is imported in this module alone, and only when it is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.kv.format import DENSE, Dense, KVFormat
from kernels.ops import AttentionBatch, AttentionLayer, Ops
from kernels.torch_ops import TorchOps
from models.errors import CheckpointError, UnsupportedArchitecture
from models.rope import RopeParameters
from models.spec import ModelSpec
from models.trial import run_trial, trial_sequences
from models.weights import checkpoint_files, read_json

ATTENTION = "foresight_paged"
# Keyword arguments with which a model asks its attention for something else than a softmax of
# scaled products; any of them given means that ours would be wrong.
BEYOND = ("softcap", "s_aux", "sinks", "position_bias", "alibi", "head_mask")
# The trial's largest error, relative to the spread of the logits.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


@dataclass(slots=True)
class PagedStep:
    """What a step hands to the attention of every layer through the library."""

    batch: AttentionBatch
    kv: Sequence[Tensor]
    ops: Ops
    windows: tuple[int | None, ...]
    formats: Sequence[KVFormat]  # of each layer's pages
    seen: list[int] = field(default_factory=list)  # layers in the order of their calls

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """q, k, v: [1, heads, tokens, head_dim] -> [1, tokens, heads, head_dim]."""
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        pages, form = self.kv[layer], self.formats[layer]
        page = form.page_shape(k.shape[1], form.page_size(pages), k.shape[2])
        if pages.shape[1:] != page or v.shape != k.shape:
            raise UnsupportedArchitecture(
                f"layer {layer} has keys of {tuple(k.shape[1:])} and values of "
                f"{tuple(v.shape[1:])} heads and dimensions; only one shape for all is supported."
            )
        if window != self.windows[layer]:
            raise UnsupportedArchitecture(
                f"layer {layer} attends to {window or 'all'} positions where config.json says "
                f"{self.windows[layer] or 'all'}."
            )
        self.seen.append(layer)
        shape = AttentionLayer(
            num_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=k.shape[2],
            scale=q.shape[2] ** -0.5 if scale is None else scale,
            cos_sin=None,
            window=window,
            kv=form,
        )
        self.ops.append(k, v, shape, pages, self.batch)
        if isinstance(form, Dense):
            q = q.to(pages.dtype)
        return self.ops.attend(q.contiguous(), pages, shape, self.batch)[None]


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    paged_step: PagedStep | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The library's attention interface. The mask it offers is not needed: pages are causal."""
    if paged_step is None:
        raise UnsupportedArchitecture("its layers do not hand keyword arguments to the attention.")
    asked = [name for name in BEYOND if others.get(name) is not None]
    if asked:
        raise UnsupportedArchitecture(f"its attention asks for {', '.join(asked)}.")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedArchitecture("its attention layers have no index.")
    out = paged_step.attend(layer, query, key, value, scaling, sliding_window)
    return out.to(query.dtype), None


class _Given(nn.Module):
    """Stands where a causal LM keeps its body, so that the LM computes its head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Any = None  # what the body is to have returned

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class TransformersDecoder(nn.Module):
    """A causal LM of the transformers library with the face of `models.decoder.Decoder`."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        """model: a `PreTrainedModel` whose attention is `ATTENTION`."""
        super().__init__()
        self.spec = spec
        self._body = model.get_decoder()
        self._given = _Given()
        # The LM's own forward knows what follows its body (scaling, caps, biases).
        path = next(name for name, module in model.named_modules() if module is self._body)
        self._head = _replace(model, path.split("."), self._given)
        self._output: Any = None  # the class of what the body returns
        self.formats: Sequence[KVFormat] = (DENSE,) * spec.num_layers

    def use_formats(self, formats: Sequence[KVFormat]) -> None:
        """How each layer's pages hold keys and values; dense unless something else is said."""
        self.formats = formats

    def forward(self, ids: Tensor, batch: AttentionBatch, kv: Sequence[Tensor], ops: Ops) -> Tensor:
        """As `models.decoder.Decoder.forward`."""
        return self.step(ids, PagedStep(batch, kv, ops, self.spec.windows, self.formats))

    def step(self, ids: Tensor, step: PagedStep) -> Tensor:
        """ids: [tokens] -> [tokens, hidden]."""
        found = self._body(
            input_ids=ids[None],
            position_ids=step.batch.positions[None],
            use_cache=False,
            paged_step=step,
        )
        self._output = type(found)
        return found.last_hidden_state[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden] -> [rows, vocab] fp32. Only after a first step."""
        self._given.output = self._output(last_hidden_state=hidden[None])
        return self._head(inputs_embeds=hidden[None], use_cache=False).logits[0].float()


def _replace(module: nn.Module, path: Sequence[str], by: nn.Module) -> nn.Module:
    """A shallow copy of `module` with another submodule at `path`; parameters are shared."""
    if not path:
        return by
    changed = copy.copy(module)
    changed._modules = dict(module._modules)
    child = module._modules[path[0]]
    assert child is not None
    changed._modules[path[0]] = _replace(child, path[1:], by)
    return changed


def fallback_spec(folder: Path) -> ModelSpec:
    """The sizes the worker needs, as far as config.json tells them; loading verifies them.

    Raises `UnsupportedArchitecture` when the library has no causal LM of this architecture.
    """
    config = _config(folder)
    generation = folder / "generation_config.json"
    eos = read_json(folder, generation.name).get("eos_token_id") if generation.exists() else None
    if eos is None:
        eos = _entry(config, "eos_token_id")
    heads, hidden = config.num_attention_heads, config.hidden_size
    longest = _entry(config, "max_position_embeddings", "max_seq_len") or 2048
    rope = _entry(config, "rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        # Beyond it the library changes the rotation of all positions, cached ones included.
        longest = min(longest, rope.get("original_max_position_embeddings") or longest)
    wide = _entry(config, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    return ModelSpec(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        intermediate_size=max(wide) if isinstance(wide, list) else wide or 4 * hidden,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=1
        if _entry(config, "multi_query")
        else _entry(config, "num_key_value_heads", "num_kv_heads") or heads,
        head_dim=_entry(config, "head_dim") or hidden // heads,
        max_position=longest,
        rope=RopeParameters(),
        windows=_windows(config),
        dtype=str(_entry(config, "dtype") or "float32").removeprefix("torch."),
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        native=False,
    )


def load_fallback(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    load_format: str = "safetensors",
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> TransformersDecoder:
    """Loads the model through the library, then tries it. Raises `CheckpointError`."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    spec = fallback_spec(folder)
    AttentionInterface.register(ATTENTION, paged_attention)
    model: Any
    progress(f"loading {spec.model_type} through the transformers library")
    arguments: dict[str, Any] = {"attn_implementation": "eager", "dtype": dtype}
    if load_format == "dummy":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(_config(folder), **arguments)
    elif load_format == "safetensors":
        checkpoint_files(folder)  # for its messages
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **arguments,
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {_first_line(error)}") from error
        model, report = loaded
        if report["missing_keys"]:
            raise CheckpointError(
                f"{folder} lacks {', '.join(sorted(report['missing_keys'])[:3])}."
            )
    else:
        raise CheckpointError(f"load_format {load_format!r} is not one of safetensors, dummy.")
    model = model.to(device or "cpu").eval().requires_grad_(False)
    name = type(model).__name__
    try:
        expected = _own_logits(model, spec)
        model.set_attn_implementation(ATTENTION)
        decoder = TransformersDecoder(model, spec)
        found = _paged_logits(decoder, dtype, expected[0].device)
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(f"architecture {name} is not supported: {error}") from error
    except (TypeError, ValueError, KeyError, RuntimeError, IndexError, AttributeError) as error:
        raise UnsupportedArchitecture(
            f"architecture {name} does not run on paged attention: {_first_line(error)}"
        ) from error
    for ours, own in zip(found, expected, strict=True):
        if not (ours - own).abs().max() <= TOLERANCE[dtype] * own.std():
            raise UnsupportedArchitecture(
                f"architecture {name} is not supported: on paged attention it gives other logits "
                "than by its own."
            )
    return decoder


def _own_logits(model: Any, spec: ModelSpec) -> list[Tensor]:
    """The trial's sequences, each in one pass of the library alone."""
    with torch.inference_mode():
        return [
            model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].float()
            for ids in trial_sequences(spec.vocab_size)
        ]


def _paged_logits(decoder: TransformersDecoder, dtype: torch.dtype, device: Any) -> list[Tensor]:
    """The trial's sequences through pages."""
    spec = decoder.spec

    def run(ids: Tensor, batch: AttentionBatch, kv: Sequence[Tensor]) -> Tensor:
        step = PagedStep(batch, kv, TorchOps(), spec.windows, decoder.formats)
        logits = decoder.logits(decoder.step(ids, step))
        if sorted(step.seen) != list(range(spec.num_layers)):
            raise UnsupportedArchitecture(
                f"only {len(set(step.seen))} of its {spec.num_layers} layers are attention "
                "that can be paged."
            )
        return logits

    with torch.inference_mode():
        return run_trial(run, spec, dtype, device)


def _config(folder: Path) -> Any:
    """The library's configuration object; raises `UnsupportedArchitecture` without a causal LM."""
    raw = read_json(folder, "config.json")
    name = next(iter(raw.get("architectures") or ()), raw.get("model_type", "(unnamed)"))
    if raw.get("quantization_config"):
        raise UnsupportedArchitecture("quantized checkpoints are not read.")
    try:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    except ImportError as error:
        raise UnsupportedArchitecture(
            f"architecture {name} needs the transformers library, which is not installed."
        ) from error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedArchitecture(
            f"architecture {name} is unknown: {_first_line(error)}"
        ) from error
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in causal or causal[type(config)].__name__ != name:
        raise UnsupportedArchitecture(f"architecture {name} is not a causal language model.")
    return config


def _windows(config: Any) -> tuple[int | None, ...]:
    """Each layer's sliding window as config.json has it; the attention's own word must agree."""
    layers = config.num_hidden_layers
    window = _entry(config, "sliding_window")
    kinds = _entry(config, "layer_types")
    if kinds is None:
        return (window,) * layers
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise UnsupportedArchitecture(
            f"{config.model_type} has layers of the kinds {', '.join(sorted(set(kinds)))}, "
            "not all of which can be paged."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _entry(config: Any, *names: str) -> Any:
    """The first of several names a foreign configuration has a value under."""
    return next((v for n in names if (v := getattr(config, n, None)) is not None), None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
