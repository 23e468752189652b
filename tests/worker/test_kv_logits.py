"""The errors of attention's logits, against sums written out one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.kv.paged import Paged
from kernels.kv.presets import layer_formats
from kernels.kv.sealed import Sealed, SealedPage
from kernels.kv.windows import Windows
from kernels.ops import AttentionBatch, AttentionLayer
from kernels.torch_ops import TorchOps
from models.loader import load_decoder
from tests.e2e.serving import REPOSITORY
from tests.e2e.test_exactness import CPU, SPEC
from tests.worker.test_kv_quality import TOKENS, formats, reader
from worker.kv_logits import EVERY, LogitError, logit_errors
from worker.kv_quality import PAGE, Reader

DEMO = REPOSITORY / "assets" / "demo" / "target"


def test_dense_pages_change_nothing() -> None:
    found = logit_errors(reader(), [TOKENS], {"auto": formats("auto")})["auto"]
    assert len(found) == SPEC.num_layers
    for layer in found:
        asked = sum(-(-len(chunk) // EVERY) for chunk in (TOKENS[:256], TOKENS[256:]))
        assert layer.queries == asked * SPEC.num_heads
        assert layer.same == layer.queries
        assert layer.squares == layer.divergence == 0.0


def test_fewer_bits_have_larger_errors_in_every_layer() -> None:
    """Of the bundled model, on a text that it knows words of."""
    from tokenizers import Tokenizer

    text = (REPOSITORY / "README.md").read_text()
    tokens = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text).ids[:300]
    model = load_decoder(DEMO, dtype=torch.float32, device=CPU)
    spec = model.spec
    names = ("int8n", "int4h", "int2h")
    forms = {
        name: layer_formats(name, spec.num_layers, spec.num_kv_heads, PAGE, spec.head_dim, 0)
        for name in names
    }
    found = logit_errors(Reader(model, TorchOps(), torch.float32, CPU), [tokens], forms)
    for layer in range(spec.num_layers):
        eight, four, two = (found[name][layer] for name in names)
        assert 0.0 < eight.rms < four.rms < two.rms
        assert 0.0 < eight.divergence < four.divergence < two.divergence
        assert eight.same > four.same > two.same


class Recording(TorchOps):
    """Keeps the queries and keys of every layer of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, AttentionLayer]] = []

    def append(
        self, k: Tensor, v: Tensor, layer: AttentionLayer, kv: Tensor, batch: AttentionBatch
    ) -> None:
        self._keys = k.clone()
        super().append(k, v, layer, kv, batch)

    def attend(self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch) -> Tensor:
        self.seen.append((q.clone(), self._keys, layer))
        return super().attend(q, kv, layer, batch)


def test_the_error_is_that_of_sums_written_out() -> None:
    tokens = TOKENS[:21]
    recording = Recording()
    plain = Reader(reader().model, recording, torch.float32, CPU)
    plain.log_probabilities(tokens, formats("auto"))
    forms = formats("int4h")
    found = logit_errors(reader(), [tokens], {"int4h": forms})["int4h"]
    for (q, k, layer), form, error in zip(recording.seen, forms, found, strict=True):
        assert isinstance(form, Paged)
        assert form.rotation is not None
        turned = form.rotation.forth(k)
        stored = form.rotation.back(form.keys.decode(form.keys.encode(turned)))
        squares = divergence = 0.0
        same = queries = 0
        for t in range(0, len(tokens), EVERY):
            for head in range(layer.num_heads):
                of = head // (layer.num_heads // layer.num_kv_heads)
                right = [float(q[t, head] @ k[s, of]) * layer.scale for s in range(t + 1)]
                wrong = [float(q[t, head] @ stored[s, of]) * layer.scale for s in range(t + 1)]
                p, other = (softmax(row) for row in (right, wrong))
                errors = [b - a for a, b in zip(right, wrong, strict=True)]
                mean = sum(w * e for w, e in zip(p, errors, strict=True))
                squares += sum(w * (e - mean) ** 2 for w, e in zip(p, errors, strict=True))
                divergence += sum(a * math.log(a / b) for a, b in zip(p, other, strict=True))
                same += right.index(max(right)) == wrong.index(max(wrong))
                queries += 1
        assert (error.queries, error.same) == (queries, same)
        assert error.squares == pytest.approx(squares, rel=1e-4)
        assert error.divergence == pytest.approx(divergence, rel=1e-3, abs=1e-6)
        assert error.rms == pytest.approx(math.sqrt(squares / queries), rel=1e-4)


def test_sealed_pages_are_compared_as_far_as_they_are_full() -> None:
    """The page that is not is read dense."""
    tokens, full = TOKENS[: 2 * PAGE + 7], 2 * PAGE
    recording = Recording()
    Reader(reader().model, recording, torch.float32, CPU).log_probabilities(tokens, formats("auto"))
    form = Sealed(2, PAGE, 16, Windows(0, PAGE), group=16)
    found = logit_errors(reader(), [tokens], {"sealed": [form] * SPEC.num_layers})["sealed"]
    page, at = SealedPage(2, PAGE, 16, group=16), torch.arange(len(tokens))
    for (q, k, layer), error in zip(recording.seen, found, strict=True):
        turned, _ = form.turned(k, k)
        pages = turned[:full].unflatten(0, (2, PAGE)).transpose(1, 2)
        sealed = page.decode(page.encode(pages, pages))[0].transpose(1, 2).flatten(0, 1)
        stored = torch.cat([sealed, turned[full:]])
        heads = torch.arange(layer.num_heads) // (layer.num_heads // layer.num_kv_heads)
        asking, expected = q[::EVERY], LogitError()
        right, wrong = (
            torch.einsum("qhd,khd->hqk", x, y[:, heads]) * layer.scale
            for x, y in ((asking, k), (form.turn(asking), stored))
        )
        expected.add(right, wrong, at > at[::EVERY, None])
        assert (error.queries, error.same) == (expected.queries, expected.same)
        assert error.squares == pytest.approx(expected.squares, rel=1e-4)
        assert error.squares > 0.0


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


def test_what_all_keys_share_is_no_error() -> None:
    right = torch.tensor([[0.5, 1.0, -2.0]])
    hidden = torch.zeros(1, 3, dtype=torch.bool)
    found = LogitError()
    found.add(right, right + 7.0, hidden)
    assert found.rms == pytest.approx(0.0, abs=1e-6)
    assert found.divergence == pytest.approx(0.0, abs=1e-6)
    hidden[0, 1] = True  # what nobody sees moves nothing
    found.add(right, right + torch.tensor([[0.0, 50.0, 0.0]]), hidden)
    assert found.rms == pytest.approx(0.0, abs=1e-6)
    assert (found.queries, found.same) == (2, 2)
