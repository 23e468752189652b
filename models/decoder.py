"""`Decoder`: the Llama family (Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE), driven by its spec."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.kv.format import KVFormat
from kernels.linear.dense import DenseLinear
from kernels.ops import AttentionBatch, AttentionLayer, Ops
from models.layers import Attention, Mlp, Target, linear_targets, weight
from models.moe import Moe
from models.parallel import ALONE, Collective, Cut, Shard
from models.rope import cos_sin_table
from models.spec import ModelSpec


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP. The residual is carried beside what is still to be added."""

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        cos_sin: Tensor,
        dtype: torch.dtype,
        device: torch.device,
        collective: Collective,
    ) -> None:
        super().__init__()
        self._eps = spec.norm_eps
        self.input_norm = weight(spec.hidden_size, dtype, device)
        self.attention = Attention(spec, index, cos_sin, dtype, device, collective)
        self.mlp_norm = weight(spec.hidden_size, dtype, device)
        self.mlp: Mlp | Moe
        if spec.moe is not None and index in spec.moe.layers:
            self.mlp = Moe(spec.hidden_size, spec.moe, dtype, device, collective)
        else:
            inner, bias = spec.intermediate_size, spec.mlp_bias
            self.mlp = Mlp(spec.hidden_size, inner, bias, dtype, device, collective)

    def forward(
        self, x: Tensor, residual: Tensor | None, batch: AttentionBatch, kv: Tensor, ops: Ops
    ) -> tuple[Tensor, Tensor]:
        """x, residual: [tokens, hidden] -> what the layer adds, and the residual without it."""
        if residual is None:
            residual, x = x, ops.rms_norm(x, self.input_norm, self._eps)
        else:
            x, residual = ops.add_rms_norm(x, residual, self.input_norm, self._eps)
        x = self.attention(x, batch, kv, ops)
        x, residual = ops.add_rms_norm(x, residual, self.mlp_norm, self._eps)
        return self.mlp(x, ops), residual

    def targets(self, prefix: str) -> Iterator[Target]:
        yield f"{prefix}.input_layernorm.weight", self.input_norm
        yield f"{prefix}.post_attention_layernorm.weight", self.mlp_norm
        yield from self.attention.targets(f"{prefix}.self_attn")
        yield from self.mlp.targets(f"{prefix}.mlp")

    def cuts(self, prefix: str, shard: Shard, whole: ModelSpec) -> Iterator[tuple[str, Cut]]:
        yield from self.attention.cuts(f"{prefix}.self_attn", shard, whole)
        yield from self.mlp.cuts(f"{prefix}.mlp", shard)


class Decoder(nn.Module):
    """A causal language model over paged KV. Built uninitialised; `models.weights` fills it."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        max_model_len: int | None = None,
        collective: Collective = ALONE,
    ) -> None:
        """max_model_len: positions the rotary tables cover; default: the checkpoint's context.

        `collective` has the other ranks, if there are any: then only this rank's part of the model
        is here, and `self.spec` is the part's. Raises `CheckpointError` where it has no parts.
        """
        super().__init__()
        device = device or torch.device("cpu")
        self._whole, self._collective = spec, collective
        self.spec = spec = collective.shard.spec(spec)
        self._cut, room = collective.shard.vocabulary(spec.vocab_size)
        table = cos_sin_table(spec.rope, spec.head_dim, max_model_len or spec.max_position)
        table = table.to(device)
        self.embedding = nn.Parameter(
            torch.empty(room, spec.hidden_size, dtype=dtype, device=device),
            requires_grad=False,
        )
        self.layers = nn.ModuleList(
            DecoderLayer(spec, i, table, dtype, device, collective) for i in range(spec.num_layers)
        )
        self.norm = weight(spec.hidden_size, dtype, device)
        # A tied head reads the embedding's own storage.
        self.head = (
            DenseLinear(self.embedding)
            if spec.tied_embeddings
            else DenseLinear.empty(spec.hidden_size, room, dtype=dtype, device=device)
        )
        for table in (self.embedding, self.head.weight):
            table[self._cut.stop - self._cut.start :] = 0.0  # no tokens

    def forward(self, ids: Tensor, batch: AttentionBatch, kv: Sequence[Tensor], ops: Ops) -> Tensor:
        """One ragged step.

        ids: [tokens] int64; kv: per layer its pool, appended to in
        place. Returns hidden states after the final norm, [tokens, hidden].
        """
        x = self._collective.lookup(ids, self.embedding)
        residual: Tensor | None = None
        for layer, pages in zip(self.layers, kv, strict=True):
            x, residual = layer(x, residual, batch, pages, ops)
        assert residual is not None, "a decoder has at least one layer"
        return ops.add_rms_norm(x, residual, self.norm, self.spec.norm_eps)[0]

    def use_formats(self, formats: Sequence[KVFormat]) -> None:
        """How each layer's pages hold keys and values; dense unless something else is said."""
        for layer, form in zip(self.layers, formats, strict=True):
            assert isinstance(layer, DecoderLayer)
            layer.attention.layer = replace(layer.attention.layer, kv=form)

    def attention_layers(self) -> list[AttentionLayer]:
        """With the formats in use."""
        attentions = [layer.attention for layer in self.layers if isinstance(layer, DecoderLayer)]
        return [attention.layer for attention in attentions]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden] -> [rows, vocab] fp32, on rank 0."""
        return self._collective.gather(self.head(hidden), self.spec.vocab_size).float()

    def targets(self) -> dict[str, Tensor]:
        """Every tensor a checkpoint must hold -> the view it is copied to."""
        rows = self._cut.stop - self._cut.start
        found: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embedding[:rows],
            "model.norm.weight": self.norm,
        }
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            found.update(layer.targets(f"model.layers.{i}"))
        if not self.spec.tied_embeddings:
            found.update(linear_targets("lm_head", self.head, {"": rows}))
        return found

    def cuts(self) -> dict[str, Cut]:
        """What of a checkpoint's tensor belongs to its target; all of it, where nothing is said."""
        shard = self._collective.shard
        if shard.size == 1:
            return {}
        found = {"model.embed_tokens.weight": self._cut, "lm_head.weight": self._cut}
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            found.update(layer.cuts(f"model.layers.{i}", shard, self._whole))
        return found
