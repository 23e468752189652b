"""Puts a `Balance` into the weights of a decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv.balance import Balance
from kernels.linear.dense import DenseLinear
from models.decoder import Decoder, DecoderLayer
from models.layers import Attention
from models.model import LanguageModel
from models.parallel import RowParallel


def can_be_balanced(model: LanguageModel) -> bool:
    """Weights in few bits cannot, and the transformers library's models are left alone."""
    return isinstance(model, Decoder) and all(
        isinstance(attention.qkv, DenseLinear) and isinstance(_inner(attention), DenseLinear)
        for attention in attentions(model)
    )


def attentions(decoder: Decoder) -> list[Attention]:
    return [layer.attention for layer in decoder.layers if isinstance(layer, DecoderLayer)]


def apply_balance(model: LanguageModel, balance: Balance) -> None:
    """Changes a freshly loaded model, which computes what it did before. Raises ValueError where it
    cannot be done; nothing has changed then."""
    if not balance.changes:
        return
    if not can_be_balanced(model):
        raise ValueError(
            "the calibration balances channels of keys and values, which weights in few bits and "
            "models of the transformers library do not allow: calibrate with the same options"
        )
    assert isinstance(model, Decoder)
    for attention, keys in zip(attentions(model), balance.keys, strict=True):
        if attention.k_norm is not None and not bool((keys == keys[:1]).all()):
            raise ValueError("heads that share their norm share the balance of their keys, too")
    with torch.no_grad():
        for attention, keys, values in zip(
            attentions(model), balance.keys, balance.values, strict=True
        ):
            _scale(attention, keys, values)


def _scale(attention: Attention, keys: Tensor, values: Tensor) -> None:
    layer = attention.layer
    group = layer.num_heads // layer.num_kv_heads
    weight, bias = attention.qkv.weight, attention.qkv.bias
    rows = torch.zeros(weight.shape[0], dtype=torch.int64)
    q, k, v = rows.split([layer.num_heads * layer.head_dim, keys.numel(), values.numel()])
    if attention.q_norm is not None and attention.k_norm is not None:
        _multiply(attention.q_norm, keys[0])
        _multiply(attention.k_norm, -keys[0])
    else:
        q += keys.repeat_interleave(group, 0).flatten()
        k -= keys.flatten()
    v -= values.flatten()
    _multiply(weight, rows[:, None])
    if bias is not None:
        _multiply(bias, rows)
    _multiply(attention.output.weight, values.repeat_interleave(group, 0).flatten())


def _multiply(weight: Tensor, exponents: Tensor) -> None:
    weight *= torch.exp2(exponents.to(weight.device, torch.float32)).to(weight.dtype)


def _inner(attention: Attention) -> torch.nn.Module:
    output = attention.output
    return output.inner if isinstance(output, RowParallel) else output
