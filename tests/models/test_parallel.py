"""A model divided among ranks computes what the whole one computes, from the parts it reads."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import weights
from models.decoder import Decoder
from models.errors import CheckpointError
from models.loader import load_decoder, read_spec
from models.parallel import ALONE, Collective, CollectiveError, Shard
from tests.models.checkpoints import Paged, save
from tests.models.ranks import on_ranks

MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 2,  # layers of both kinds
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
# The vocabulary of 101 divides evenly by nothing.
CASES = {
    "llama": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama-shared-kv-heads": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2-biases-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3-tied": ("qwen3", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3-moe": ("qwen3_moe", MOE),
}
LENGTHS = (30, 9)
STEPS = [[(0, 0, 20)], [(0, 20, 26), (1, 0, 8)], [(0, 26, 27), (1, 8, 9)]]


def load(folder: Path, collective: Collective = ALONE) -> Decoder:
    return load_decoder(folder, dtype=torch.float32, collective=collective)


def logits(decoder: Decoder) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    paged = Paged(decoder, [torch.randint(3, 101, (n,), generator=g) for n in LENGTHS])
    return [part for spans in STEPS for part in paged.step(spans)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_one_rank(case: str, size: int, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    save(tmp_path, model_type, **changes)
    expected = logits(load(tmp_path))
    found = on_ranks(size, lambda collective: logits(load(tmp_path, collective)))[0]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["llama", "qwen3-tied", "qwen3-moe"])
def test_a_rank_reads_and_holds_its_part_alone(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_type, changes = CASES[case]
    save(tmp_path, model_type, **changes)
    whole = load(tmp_path)
    read: dict[int, int] = {}
    tensors = weights.read_tensors

    def counted(path, cuts):
        for name, tensor in tensors(path, cuts):
            read[id(cuts)] = read.get(id(cuts), 0) + tensor.numel()
            yield name, tensor

    monkeypatch.setattr(weights, "read_tensors", counted)
    size = 2
    parts = on_ranks(size, lambda collective: load(tmp_path, collective))

    def numbers(decoder: Decoder, *, everywhere: bool) -> int:
        """Of those that every rank has, or of the others."""
        small = ("norm", "gate.weight")
        return sum(
            target.numel()
            for name, target in decoder.targets().items()
            if any(word in name for word in small) == everywhere
        )

    divided, everywhere = numbers(whole, everywhere=False), numbers(whole, everywhere=True)
    assert everywhere < divided / 20
    assert sum(numbers(part, everywhere=False) for part in parts) == divided
    assert all(numbers(part, everywhere=True) == everywhere for part in parts)
    assert sorted(read.values()) == sorted(
        sum(target.numel() for target in part.targets().values()) for part in parts
    )
    padding = 64 * (1 if whole.spec.tied_embeddings else 2)  # of a vocabulary of 101
    held = sum(p.numel() for part in parts for p in part.parameters())
    assert held == divided + size * everywhere + padding


def test_shapes_of_the_whole_are_told(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = torch.ones(64, 80)
    save_file(tensors, file)
    words = rf"{name} has shape \[64, 80\] where config.json implies 64 along dimension 1"
    with pytest.raises(CheckpointError, match=words):
        on_ranks(2, lambda collective: load(tmp_path, collective))


@pytest.mark.parametrize(
    ("changes", "size", "sentence"),
    [
        ({}, 3, "4 attention heads cannot be divided among 3 ranks."),
        (
            {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3},
            2,
            "3 KV heads can be neither divided among 2 ranks nor given to groups of them.",
        ),
        ({"intermediate_size": 97}, 2, "97 neurons of the MLP cannot be divided among 2 ranks."),
    ],
)
def test_what_cannot_be_divided(
    changes: dict[str, int], size: int, sentence: str, tmp_path: Path
) -> None:
    save(tmp_path, "llama", **changes)
    with pytest.raises(CheckpointError) as error:
        Shard(0, size).spec(read_spec(tmp_path))
    assert str(error.value) == sentence


def test_experts_that_cannot_be_divided(tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe", **MOE | {"moe_intermediate_size": 33})
    with pytest.raises(CheckpointError) as error:
        Shard(0, 2).spec(read_spec(tmp_path))
    assert str(error.value) == "33 neurons of an expert cannot be divided among 2 ranks."


def test_a_model_that_the_transformers_library_runs(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    spec = replace(read_spec(tmp_path), native=False, model_type="gpt_neox")
    with pytest.raises(CheckpointError, match=r"^a gpt_neox model runs through the transformers"):
        Shard(1, 2).spec(spec)


def test_weights_in_few_bits(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    with pytest.raises(CheckpointError, match="few bits are not divided among ranks yet"):
        on_ranks(
            2,
            lambda collective: load_decoder(
                tmp_path, dtype=torch.float32, quantization="int8", collective=collective
            ),
        )


@pytest.mark.parametrize("size", [2, 3, 7])
def test_the_vocabulary_is_covered_once(size: int) -> None:
    for vocabulary in (1, 5, 7, 101, 4096):
        cuts = [Shard(rank, size).vocabulary(vocabulary)[0] for rank in range(size)]
        tokens = [token for cut in cuts for token in range(cut.start, cut.stop)]
        assert tokens == list(range(vocabulary))


def test_embedding_and_head_are_exact() -> None:
    table = torch.randn(11, 6).bfloat16()
    ids, hidden = torch.tensor([0, 10, 3, 7, 7]), torch.randn(5, 11)

    def run(collective: Collective) -> tuple[Tensor, Tensor]:
        cut, room = collective.shard.vocabulary(11)
        mine = torch.zeros(room, 6, dtype=table.dtype)
        mine[: cut.stop - cut.start] = table[cut.start : cut.stop]
        columns = torch.zeros(5, room)
        columns[:, : cut.stop - cut.start] = hidden[:, cut.start : cut.stop]
        return collective.lookup(ids, mine), collective.gather(columns, 11)

    found = on_ranks(3, run)
    for rows, _ in found:
        assert torch.equal(rows, table[ids])
    assert torch.equal(found[0][1], hidden)
    assert found[0][1].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ordered_sum_does_not_depend_on_the_size_of_the_step(dtype: torch.dtype) -> None:
    parts = torch.randn(4, 33, 50, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(collective: Collective) -> tuple[Tensor, Tensor, Tensor]:
        mine = parts[collective.shard.rank]
        return (
            collective.all_reduce(mine.clone()),
            collective.all_reduce(mine[:7].clone()),
            collective.all_reduce(mine[32:].clone()),
        )

    expected = parts[0] + parts[1] + parts[2] + parts[3]
    for whole, first, last in on_ranks(4, run, ordered=True):
        assert torch.equal(whole, expected)
        assert torch.equal(first, expected[:7])
        assert torch.equal(last, expected[32:])


@pytest.mark.parametrize("ordered", [False, True])
def test_all_ranks_have_the_same_bits(ordered: bool) -> None:
    parts = torch.randn(4, 33, 50)
    run = lambda collective: collective.all_reduce(parts[collective.shard.rank].clone())  # noqa: E731
    first, *others = on_ranks(4, run, ordered=ordered)
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, parts.sum(0))


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever() -> None:
    def run(collective: Collective) -> float:
        started = time.monotonic()
        if collective.shard.rank == 0:
            with pytest.raises(CollectiveError, match=r"lost touch with each other: .*Timed out"):
                collective.all_reduce(torch.ones(3))
        else:
            time.sleep(2.5)
        return time.monotonic() - started

    assert on_ranks(2, run, timeout=timedelta(seconds=1))[0] < 2.5
