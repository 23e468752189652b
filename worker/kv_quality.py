"""What a KV format does to a model's words: the same text read from pages of different formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.packed import native_format
from kernels.kv.format import DENSE, Dense, KVFormat
from kernels.kv.windows import DensePages
from kernels.ops import AttentionBatch, Ops
from kernels.torch_ops import TorchOps
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

    def key_means(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """[layers, kv_heads, head_dim] fp32 on the CPU, of the keys as they would be stored."""
        listening = [_Listening() for _ in range(self.model.spec.num_layers)]
        ops, self.ops = self.ops, TorchOps()  # which leave the storing to the format
        try:
            for tokens in texts:
                self.log_probabilities(tokens, listening)
                for layer in listening:
                    layer.seen = 0
        finally:
            self.ops = ops
        return torch.stack([layer.mean() for layer in listening])


class _Listening(Dense):
    """Dense pages that sum up what is stored."""

    def __init__(self) -> None:
        self.seen = 0  # positions of this text
        self._count = 0
        self._sum: Tensor | None = None

    def append(
        self,
        k: Tensor,
        v: Tensor,
        kv: Tensor,
        kv_slots: Tensor,
        copies: DensePages | None = None,
    ) -> None:
        super().append(k, v, kv, kv_slots)
        counted = k[max(SINKS - self.seen, 0) :].float()
        self.seen += k.shape[0]
        self._count += counted.shape[0]
        total = counted.sum(0)
        self._sum = total if self._sum is None else self._sum + total

    def mean(self) -> Tensor:
        assert self._sum is not None
        return (self._sum / max(self._count, 1)).cpu()


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
