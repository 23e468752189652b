"""What the comparisons of KV formats read, and how."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.kv_demotion import pages_of, read_on
from benchmarks.kv_demotion_load import shared
from benchmarks.kv_formats import formats_of
from benchmarks.kv_texts import UNREAD, unread
from benchmarks.kv_ties import Choices
from kernels.torch_ops import TorchOps
from makers.demo_facts import MODULES
from models.loader import load_decoder
from tests.e2e.serving import REPOSITORY
from worker.kv_quality import Reader

DEMO = REPOSITORY / "assets" / "demo" / "target"
CPU = torch.device("cpu")


def test_library_texts_are_new_to_the_models_and_read_once() -> None:
    assert set(UNREAD).isdisjoint(MODULES)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    some = unread(tokenizer, 17, 8192)
    assert {len(piece) for piece in some} == {8192}
    assert len({tuple(piece[:64]) for piece in some}) == len(some)
    with pytest.raises(ValueError, match="only 17 pieces of 8192 tokens"):
        unread(tokenizer, 18, 8192)


def test_what_is_demoted_is_read_by_its_upper_halves() -> None:
    reader = Reader(
        load_decoder(DEMO, dtype=torch.float32, device=CPU), TorchOps(), torch.float32, CPU
    )
    tokens = torch.randint(3, 4096, (128,), generator=torch.Generator().manual_seed(0)).tolist()
    formats = pages_of(reader, "int8n", halves=True)
    whole, most, some, none = read_on(reader, formats, tokens, 64, [None, 0, 48, 128])
    said = reader.log_probabilities(tokens, formats_of(reader, "int8n"))[64:]
    torch.testing.assert_close(whole, said, rtol=0, atol=1e-4)
    assert torch.equal(none, whole)
    # Of 64 tokens the first page and the latest 48 are all; of 80 they leave a page.
    assert torch.equal(some[:16], whole[:16])
    assert not torch.equal(some[16:32], whole[16:32])

    def divergence(found: torch.Tensor) -> float:
        return float((whole.exp() * (whole - found)).sum(-1).mean())

    assert divergence(most) > divergence(some) > 0
    coarse = [form.coarse() for form in formats]
    low = read_on(reader, coarse, tokens, 64, [None])[0]
    assert divergence(low) > divergence(most)


def test_margins_are_those_of_dense_choices() -> None:
    dense = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.1, 0.2, 0.7]]).log()
    found = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.4, 0.3], [0.1, 0.2, 0.7]]).log()
    choices = Choices()
    choices.add(found, dense)
    assert choices.tokens == 3
    assert choices.changed == pytest.approx([float(torch.tensor(0.4 / 0.35).log())])
    assert choices.same == pytest.approx(2 / 3)


def test_texts_that_part() -> None:
    assert shared([1, 2, 3], [1, 2, 4]) == 2
    assert shared([1, 2], [1, 2, 4]) == 2
