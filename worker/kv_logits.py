"""What a KV format does to attention's logits, layer by layer.

A text is read from dense pages; at every layer its keys are stored in other formats as well, and
the logits that the layer's own queries have with them are compared. So a layer's error is its own:
what it reads is exact, and what comes of the error does not reach the next one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.kv.format import KVFormat, dense_rows
from kernels.kv.windows import DensePages
from kernels.ops import AttentionBatch, AttentionLayer
from worker.kv_quality import PAGE, Reader, read_dense

EVERY = 4  # of so many positions one is asked for its queries


@dataclass(slots=True)
class LogitError:
    """Of one layer with one format's keys, over queries of all heads."""

    queries: int = 0
    squares: float = 0.0  # sums over queries
    divergence: float = 0.0
    same: int = 0

    def add(self, right: Tensor, found: Tensor, hidden: Tensor) -> None:
        """right, found: [..., queries, keys] fp32; hidden: the keys [queries, keys] that a query
        does not see.

        Squares are weighted by attention, and free of what all keys of a query share, which no
        softmax sees: sum over t of p_t (e_t - sum over s of p_s e_s)^2.
        """
        log_p = right.masked_fill(hidden, -torch.inf).log_softmax(-1)
        log_found = found.masked_fill(hidden, -torch.inf).log_softmax(-1)
        p, error = log_p.exp(), found - right
        error = error - (p * error).sum(-1, keepdim=True)
        moved = (log_p - log_found).masked_fill(hidden, 0.0)
        self.queries += right.shape[:-1].numel()
        self.squares += float((p * error.square()).sum())
        self.divergence += float((p * moved).sum())
        self.same += int((log_p.argmax(-1) == log_found.argmax(-1)).sum())

    @property
    def rms(self) -> float:
        """The weighted error of a logit, in nats."""
        return math.sqrt(self.squares / self.queries)

    def cells(self) -> tuple[str, ...]:
        kept = f"{self.same / self.queries:.2%}"
        return (f"{self.rms:.2g}", f"{self.divergence / self.queries:.2g}", kept)


def logit_errors(
    reader: Reader,
    texts: Sequence[Sequence[int]],
    formats: Mapping[str, Sequence[KVFormat]],
) -> dict[str, list[LogitError]]:
    """Of each format, layer by layer. `formats`: of the layers' pages, as in `Reader`."""
    layers = reader.model.spec.num_layers
    found = {name: [LogitError() for _ in range(layers)] for name in formats}

    def notice(
        index: int, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, batch: AttentionBatch
    ) -> None:
        length, heads = len(k), layer.num_kv_heads
        pages = -(-length // PAGE)
        slots = torch.arange(length, device=q.device)
        table = torch.arange(1, pages + 1, device=q.device)[None]  # page 0 is not for keeping
        copies = DensePages(table, slots + PAGE, pages + 1)
        asking, at = q[::EVERY], batch.positions[::EVERY, None]
        hidden = slots > at
        if layer.window is not None:
            hidden |= slots <= at - layer.window
        right = _logits(asking, k.transpose(0, 1), layer)
        for name, forms in formats.items():
            form = forms[index]
            rows = pages + 1 + dense_rows(form, pages + 1, heads, PAGE, layer.head_dim, k.dtype)
            shape = (rows, *form.page_shape(heads, PAGE, layer.head_dim))
            pool = torch.zeros(shape, dtype=form.pool_dtype(k.dtype), device=q.device)
            form.append(k.contiguous(), v.contiguous(), pool, slots + PAGE, copies)
            keys, _ = form.gather(pool, table)
            other = _logits(form.turn(asking.float()), keys[0, :, :length], layer)
            if form.windows is not None and form.windows.block:
                # A page that is not full is always read dense, and may not be packed yet.
                full = length - length % PAGE
                other[..., full:] = right[..., full:]
            found[name][index].add(right, other, hidden)

    read_dense(reader, texts, notice)
    return found


def _logits(q: Tensor, keys: Tensor, layer: AttentionLayer) -> Tensor:
    """q: [tokens, heads, head_dim], keys: [kv_heads, length, head_dim] -> [kv_heads, heads of one,
    tokens, length] fp32."""
    grouped = q.float().unflatten(1, (layer.num_kv_heads, -1)).permute(1, 2, 0, 3)
    return grouped @ keys.float()[:, None].mT * layer.scale
