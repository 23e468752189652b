"""Tiny random checkpoints written by the transformers library, and steps over paged KV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kernels.torch_ops import TorchOps
from models.decoder import Decoder
from models.transformers_fallback import TransformersDecoder
from tests.kernels.batches import Rows

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save(folder: Path, model_type: str, shard_size: str = "1GB", **changes) -> PreTrainedModel:
    """Writes a random model of `SIZES` with `changes` and returns it, in fp32 for evaluation."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Far enough from the initial zeros and ones that a mix-up shows.
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
            else:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def expected_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """ids: [tokens] -> [tokens, vocab] of the transformers library, one whole pass."""
    with torch.inference_mode():
        return model(ids[None], use_cache=False).logits[0].float()


class Paged:
    """Sequences that go through a decoder step by step, on shuffled pages."""

    def __init__(
        self,
        decoder: Decoder | TransformersDecoder,
        sequences: Sequence[Tensor],
        page_size: int = 8,
    ) -> None:
        g = torch.Generator().manual_seed(11)
        self._rows = Rows.shuffled([len(ids) for ids in sequences], page_size, g)
        spec = decoder.spec
        size = (self._rows.num_pages, 2, spec.num_kv_heads, page_size, spec.head_dim)
        dtype = next(decoder.parameters()).dtype
        self._kv = [torch.zeros(size, dtype=dtype) for _ in range(spec.num_layers)]
        self._decoder, self._sequences, self._ops = decoder, sequences, TorchOps()

    def step(self, spans: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """spans: (sequence, first, behind the last) -> each one's logits [tokens, vocab]."""
        ids = torch.cat([self._sequences[row][start:stop] for row, start, stop in spans])
        with torch.inference_mode():
            hidden = self._decoder(ids, self._rows.step(spans), self._kv, self._ops)
            logits = self._decoder.logits(hidden)
        return list(logits.split([stop - start for _, start, stop in spans]))
