"""What a model's keys, values and queries are like, and what follows for storing them: means,
channels that stand out, and how large heads are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.kv.balance import Balance, exponents, paired
from kernels.kv.scales import HeadScales, scale_exponents
from kernels.ops import AttentionBatch, AttentionLayer
from models.balance import apply_balance, attentions, can_be_balanced
from models.decoder import Decoder
from models.layers import Attention
from models.spec import ModelSpec
from worker.kv_quality import Reader, read_dense

SINKS = 64  # first positions, whose keys are unlike others and count for nothing


@dataclass(slots=True)
class Moments:
    """Of one layer's keys, values and queries: sums over positions, fp64 on the CPU."""

    count: int
    keys: Tensor  # [kv_heads, head_dim]
    key_squares: Tensor  # the same
    value_squares: Tensor  # the same
    query_squares: Tensor  # the same, over all query heads of a KV head

    @staticmethod
    def none(spec: ModelSpec) -> Moments:
        shape = (4, spec.num_kv_heads, spec.head_dim)
        return Moments(0, *torch.zeros(*shape, dtype=torch.float64))

    def add(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim]."""
        self.count += k.shape[0]
        self.keys += k.double().sum(0).cpu()
        self.key_squares += k.double().square().sum(0).cpu()
        self.value_squares += v.double().square().sum(0).cpu()
        grouped = q.double().unflatten(1, (k.shape[1], -1))
        self.query_squares += grouped.square().sum((0, 2)).cpu()

    @property
    def key_mean(self) -> Tensor:
        """[kv_heads, head_dim] fp32."""
        return (self.keys / max(self.count, 1)).float()


def moments(reader: Reader, texts: Sequence[Sequence[int]]) -> list[Moments]:
    """Of each layer, over all positions but each text's first `SINKS`."""
    spec = reader.model.spec
    found = [Moments.none(spec) for _ in range(spec.num_layers)]

    def notice(
        index: int, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: AttentionBatch
    ) -> None:
        counts = batch.positions >= SINKS
        at = batch.positions[counts]
        found[index].add(q[counts], k[at], v[at])

    read_dense(reader, texts, notice)
    return found


def key_means(reader: Reader, texts: Sequence[Sequence[int]]) -> Tensor:
    """[layers, kv_heads, head_dim] fp32 on the CPU, of the keys as they would be stored."""
    return torch.stack([found.key_mean for found in moments(reader, texts)])


def head_scales(reader: Reader, texts: Sequence[Sequence[int]], means: Tensor) -> HeadScales:
    """Of keys less their means, [layers, kv_heads, head_dim], and of values. Over all positions:
    the first ones are unlike others, and stored like them."""
    largest = torch.zeros(2, *means.shape[:2])

    def notice(
        index: int, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: AttentionBatch
    ) -> None:
        stored = k[batch.positions].float() - means[index].to(k.device), v[batch.positions].float()
        sizes = torch.stack([x.abs().amax((0, 2)).cpu() for x in stored])
        largest[:, index] = torch.maximum(largest[:, index], sizes)

    read_dense(reader, texts, notice)
    return HeadScales(*scale_exponents(largest))


def balance(reader: Reader, texts: Sequence[Sequence[int]]) -> Balance:
    """Makes channels of keys and values alike, in the reader's model, and says how; where its
    weights do not allow it, nothing changes."""
    spec, model = reader.model.spec, reader.model
    if not can_be_balanced(model):
        return Balance.nothing((spec.num_layers, spec.num_kv_heads, spec.head_dim))
    assert isinstance(model, Decoder)
    each = zip(moments(reader, texts), attentions(model), strict=True)
    keys, values = zip(*(_exponents(*layer) for layer in each), strict=True)
    found = Balance(torch.stack(keys), torch.stack(values))
    apply_balance(model, found)
    return found


def _exponents(of: Moments, attention: Attention) -> tuple[Tensor, Tensor]:
    """Of the keys and values of one layer: see `Balance`."""
    asked, stored = paired(of.query_squares), paired(of.key_squares)
    if attention.k_norm is not None:  # all heads have the same
        asked, stored = (x.sum(0, keepdim=True).expand_as(x) for x in (asked, stored))
    columns = attention.output.weight.double().square().sum(0).cpu()
    taken = columns.view(of.keys.shape[0], -1, of.keys.shape[1]).sum(1)
    return exponents(stored, asked), exponents(of.value_squares, taken)
