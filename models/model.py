"""`LanguageModel`: what the worker runs, native or through the transformers library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kernels.kv.format import KVFormat
from kernels.ops import AttentionBatch, Ops
from models.spec import ModelSpec


class LanguageModel(Protocol):
    """A causal language model over paged KV."""

    spec: ModelSpec

    def __call__(
        self, ids: Tensor, batch: AttentionBatch, kv: Sequence[Tensor], ops: Ops
    ) -> Tensor:
        """One ragged step; see `models.decoder.Decoder.forward`."""
        ...

    def use_formats(self, formats: Sequence[KVFormat]) -> None:
        """How each layer's pages hold keys and values; dense unless something else is said."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden] -> [rows, vocab] fp32."""
        ...
