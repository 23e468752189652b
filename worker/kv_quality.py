"""What a KV format does to a model's words: the same text read from pages of different formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.packed import native_format
from kernels.kv.format import DENSE, KVFormat
from kernels.kv.windows import DensePages
from kernels.ops import AttentionBatch, AttentionLayer, Ops
from kernels.torch_ops import TorchOps
from models.model import LanguageModel
from worker.kv_pool import allocate_pool
from worker.runner import EagerRunner

PAGE = 32  # positions, as many as a sealed page takes
CHUNK = 256  # tokens read at a time


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


Notice = Callable[[int, Tensor, Tensor, Tensor, AttentionLayer, AttentionBatch], None]


class WatchedOps(TorchOps):
    """Attention over one sequence's dense pages, which tells at every layer who asks and what is
    there: the layer's number; q, [tokens, heads, head_dim]; k and v of all positions so far, each
    [positions, kv_heads, head_dim]; and what else attention is given.

    A step attends once in every layer, in their order.
    """

    def __init__(self, layers: int, notice: Notice) -> None:
        super().__init__()
        self._layers, self._layer, self._notice = layers, 0, notice

    def attend(self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch) -> Tensor:
        index, self._layer = self._layer, (self._layer + 1) % self._layers
        pages = -(-batch.max_kv // PAGE)
        gathered = layer.kv.gather(kv, batch.page_table[:, :pages].long())
        k, v = (part[0, :, : batch.max_kv].transpose(0, 1) for part in gathered)
        self._notice(index, q, k, v, layer, batch)
        return super().attend(q, kv, layer, batch)


def read_dense(reader: Reader, texts: Sequence[Sequence[int]], notice: Notice) -> None:
    """Reads texts from dense pages, in plain torch operations, and tells of every layer."""
    layers = reader.model.spec.num_layers
    watched = Reader(reader.model, WatchedOps(layers, notice), reader.dtype, reader.device)
    for tokens in texts:
        watched.log_probabilities(tokens, [DENSE] * layers)


def one_row(
    start: int,
    count: int,
    pages: int,
    device: torch.device | None = None,
    page_size: int = PAGE,
) -> AttentionBatch:
    """A step of one sequence on pages 1, 2, ..., dense copies likewise."""
    positions = torch.arange(start, start + count, device=device)
    table = torch.arange(1, pages + 1, dtype=torch.int32, device=device)[None]
    return AttentionBatch(
        positions=positions,
        token_rows=torch.zeros(count, dtype=torch.int64, device=device),
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
        kv_lengths=torch.tensor([start + count], dtype=torch.int32, device=device),
        page_table=table,
        kv_slots=positions + page_size,
        max_query=count,
        max_kv=start + count,
        copies=DensePages(table, positions + page_size, pages + 1),
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
