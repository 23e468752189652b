"""`Runner`: a model bound to one arithmetic. A sequence keeps its runner from admission to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kernels.coarse import CoarseOps
from kernels.cpu.chain import NativeChain
from kernels.ops import AttentionBatch, Ops
from models.decoder import Decoder
from models.model import LanguageModel


class Runner(Protocol):
    """What the worker needs of a model."""

    name: str

    @property
    def chain(self) -> NativeChain | None:
        """Several drafts in one call, where there is such a thing."""
        ...

    def forward(
        self,
        ids: Tensor,
        batch: AttentionBatch,
        kv: Sequence[Tensor],
        read: Tensor | None = None,
    ) -> Tensor:
        """ids: [tokens] int64 -> hidden states after the final norm.

        read: [reads] int64, distinct token rows whose states are wanted, None for all of them;
        the result is [reads, hidden].
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden] -> [rows, vocab] fp32."""
        ...

    def coarse(self) -> Runner:
        """The same model, reading the same pages with fewer bits (`KVFormat.coarse`)."""
        ...


class EagerRunner:
    """Any model, operation by operation, on one implementation of `Ops`."""

    def __init__(self, model: LanguageModel, ops: Ops) -> None:
        self.name = ops.name
        self.chain: NativeChain | None = None
        # Experts are chosen on the host, and the library's models are anybody's.
        self.capturable = (
            isinstance(model, Decoder)
            and model.spec.moe is None
            and all(ops.captures(layer) for layer in model.attention_layers())
        )
        self._model = model
        self._ops = ops

    def forward(
        self,
        ids: Tensor,
        batch: AttentionBatch,
        kv: Sequence[Tensor],
        read: Tensor | None = None,
    ) -> Tensor:
        hidden = self._model(ids, batch, kv, self._ops)
        return hidden if read is None else hidden[read]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)

    def coarse(self) -> Runner:
        return EagerRunner(self._model, CoarseOps(self._ops))
