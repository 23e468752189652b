"""What a KV format does to a model's words: the same text read from pages of different formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.packed import native_format
from kernels.kv.balance import Balance, exponents, paired
from kernels.kv.format import DENSE, KVFormat
from kernels.kv.windows import DensePages
from kernels.ops import AttentionBatch, AttentionLayer, Ops
from kernels.torch_ops import TorchOps
from models.balance import apply_balance, attentions, can_be_balanced
from models.decoder import Decoder
from models.layers import Attention
from models.model import LanguageModel
from worker.kv_pool import allocate_pool
from worker.runner import EagerRunner

PAGE, CHUNK = 16, 256  # positions, and tokens read at a time
SINKS = 64  # first positions, whose keys are unlike others and count in no mean


@dataclass(slots=True)
class Reader:
    """Reads texts with a model, each by itself, every position from stored pages."""

    model: LanguageModel
    ops: Ops
    dtype: torch.dtype
    device: torch.device

    def log_probabilities(self, tokens: Sequence[int], formats: Sequence[KVFormat]) -> Tensor:
        """[len(tokens), vocab] fp32, of what follows each token. `formats` of the layers' pages,
        for a page size of `PAGE`; the model is left with dense ones."""
        self.model.use_formats(formats)
        try:
            return self._read(tokens, formats)
        finally:
            self.model.use_formats([DENSE] * len(formats))

    def _read(self, tokens: Sequence[int], formats: Sequence[KVFormat]) -> Tensor:
        pages = -(-len(tokens) // PAGE)
        spec = self.model.spec
        kv = allocate_pool(spec, pages + 1, PAGE, self.dtype, self.device, formats, pages + 1)
        runner = EagerRunner(self.model, self._ops_for(formats))
        found = []
        with torch.inference_mode():
            for start in range(0, len(tokens), CHUNK):
                ids = torch.tensor(tokens[start : start + CHUNK], device=self.device)
                hidden = runner.forward(ids, one_row(start, len(ids), pages, self.device), kv)
                found.append(runner.logits(hidden).log_softmax(-1))
        return torch.cat(found)

    def _ops_for(self, formats: Sequence[KVFormat]) -> Ops:
        """Plain torch where there are pages that native kernels do not read."""
        try:
            for form in formats:
                native_format(form)
        except ValueError:
            return TorchOps()
        return self.ops

    def moments(self, texts: Sequence[Sequence[int]]) -> list[Moments]:
        """Of each layer, over all positions but each text's first `SINKS`."""
        watching = _Watching(self.model.spec.num_layers)
        reader = Reader(self.model, watching, self.dtype, self.device)
        for tokens in texts:
            reader.log_probabilities(tokens, [DENSE] * len(watching.found))
        return watching.found

    def key_means(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """[layers, kv_heads, head_dim] fp32 on the CPU, of the keys as they would be stored."""
        return torch.stack([found.key_mean for found in self.moments(texts)])

    def balance(self, texts: Sequence[Sequence[int]]) -> Balance:
        """Makes channels of keys and values alike, in the model, and says how; where its weights
        do not allow it, nothing changes."""
        spec, model = self.model.spec, self.model
        found = Balance.nothing((spec.num_layers, spec.num_kv_heads, spec.head_dim))
        if can_be_balanced(model):
            assert isinstance(model, Decoder)
            each = zip(self.moments(texts), attentions(model), strict=True)
            keys, values = zip(*(_exponents(*layer) for layer in each), strict=True)
            found = Balance(torch.stack(keys), torch.stack(values))
            apply_balance(model, found)
        return found


@dataclass(slots=True)
class Moments:
    """Of one layer's keys, values and queries: sums over positions, fp64 on the CPU."""

    count: int
    keys: Tensor  # [kv_heads, head_dim]
    key_squares: Tensor  # the same
    value_squares: Tensor  # the same
    query_squares: Tensor  # the same, over all query heads of a KV head

    @staticmethod
    def none(kv_heads: int, head_dim: int) -> Moments:
        return Moments(0, *torch.zeros(4, kv_heads, head_dim, dtype=torch.float64))

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


class _Watching(TorchOps):
    """Attention over one sequence's dense pages that takes note of what is stored and asked.

    A step attends once in every layer, in their order.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self._layers, self._layer = layers, 0
        self.found = [Moments.none(0, 0) for _ in range(layers)]

    def attend(self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch) -> Tensor:
        index, self._layer = self._layer, (self._layer + 1) % self._layers
        if not self.found[index].count:
            self.found[index] = Moments.none(layer.num_kv_heads, layer.head_dim)
        pages = -(-batch.max_kv // PAGE)
        k, v = layer.kv.gather(kv, batch.page_table[:, :pages].long())
        counted = batch.positions[batch.positions >= SINKS]
        asking = q[batch.positions >= SINKS]
        self.found[index].add(asking, *(part[0][:, counted].transpose(0, 1) for part in (k, v)))
        return super().attend(q, kv, layer, batch)


def _exponents(moments: Moments, attention: Attention) -> tuple[Tensor, Tensor]:
    """Of the keys and values of one layer: see `Balance`."""
    asked, stored = paired(moments.query_squares), paired(moments.key_squares)
    if attention.k_norm is not None:  # all heads have the same
        asked, stored = (x.sum(0, keepdim=True).expand_as(x) for x in (asked, stored))
    columns = attention.output.weight.double().square().sum(0).cpu()
    taken = columns.view(moments.keys.shape[0], -1, moments.keys.shape[1]).sum(1)
    return exponents(stored, asked), exponents(moments.value_squares, taken)


def one_row(
    start: int, count: int, pages: int, device: torch.device | None = None
) -> AttentionBatch:
    """A step of one sequence on pages 1, 2, ... of `PAGE` positions, dense copies likewise."""
    positions = torch.arange(start, start + count, device=device)
    table = torch.arange(1, pages + 1, dtype=torch.int32, device=device)[None]
    return AttentionBatch(
        positions=positions,
        token_rows=torch.zeros(count, dtype=torch.int64, device=device),
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
        kv_lengths=torch.tensor([start + count], dtype=torch.int32, device=device),
        page_table=table,
        kv_slots=positions + PAGE,
        max_query=count,
        max_kv=start + count,
        copies=DensePages(table, positions + PAGE, pages + 1),
    )


@dataclass(slots=True)
class Distance:
    """Of one format from dense pages, over tokens."""

    tokens: int = 0
    loss: float = 0.0  # sums over tokens
    dense_loss: float = 0.0
    same: int = 0
    divergence: float = 0.0

    def add(self, found: Tensor, dense: Tensor, following: Tensor) -> None:
        self.tokens += len(following)
        self.loss -= float(found.gather(1, following[:, None]).sum())
        self.dense_loss -= float(dense.gather(1, following[:, None]).sum())
        self.same += int((found.argmax(-1) == dense.argmax(-1)).sum())
        self.divergence += float((dense.exp() * (dense - found)).sum())

    @property
    def rise(self) -> float:
        """Of the loss, relative."""
        return self.loss / self.dense_loss - 1.0

    def cells(self) -> tuple[str, ...]:
        agreed = f"{self.same / self.tokens:.2%}"
        return (f"{self.rise:+.3%}", f"{self.divergence / self.tokens:.2g}", agreed)
