"""Channels of keys and values that are made alike: nothing changes but what is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.kv_texts import inject_outliers
from kernels.kv.balance import LARGEST, Balance, exponents, paired
from kernels.kv.presets import layer_formats
from kernels.torch_ops import TorchOps
from models.balance import apply_balance, can_be_balanced
from models.decoder import Decoder
from models.loader import load_decoder, load_model
from tests.models.checkpoints import Paged, save
from tests.models.ranks import on_ranks
from worker.kv_moments import balance
from worker.kv_quality import PAGE, Distance, Reader

CPU = torch.device("cpu")
TARGET = Path(__file__).parents[2] / "assets" / "demo" / "target"
FAMILIES = {
    "qwen3": {},  # norms that heads share
    "qwen2": {},  # biases
    "llama": {"num_key_value_heads": 4},
    "mistral": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def random_balance(decoder: Decoder, same: bool, seed: int = 0) -> Balance:
    """Any that is allowed; `same`: for all heads of a layer."""
    spec, g = decoder.spec, torch.Generator().manual_seed(seed)
    shape = (spec.num_layers, spec.num_kv_heads, spec.head_dim)
    keys, values = torch.randint(-LARGEST, LARGEST + 1, (2, *shape), generator=g)
    half = keys[..., : spec.head_dim // 2]
    keys = torch.cat([half, half], -1)
    return Balance(keys[:, :1].expand(shape).clone() if same else keys, values)


def steps(decoder: Decoder) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    paged = Paged(decoder, [torch.randint(3, 101, (n,), generator=g) for n in (30, 9)])
    spans = [[(0, 0, 20)], [(0, 20, 29), (1, 0, 8)], [(0, 29, 30), (1, 8, 9)]]
    return [logits for step in spans for logits in paged.step(step)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_stay_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path, family, **FAMILIES[family])
    plain, changed = (load_decoder(tmp_path, dtype=dtype) for _ in range(2))
    chosen = random_balance(changed, same=family.startswith("qwen3"))
    assert chosen.changes
    apply_balance(changed, chosen)
    weight = changed.layers[0].attention.qkv.weight
    assert not torch.equal(weight, plain.layers[0].attention.qkv.weight)
    for a, b in zip(steps(changed), steps(plain), strict=True):
        assert torch.equal(a, b)


def test_ranks_have_their_heads_part(tmp_path: Path) -> None:
    save(tmp_path, "llama", num_key_value_heads=2)
    plain = load_decoder(tmp_path, dtype=torch.float32)
    chosen = random_balance(plain, same=False)

    def balanced(collective) -> list[Tensor]:
        decoder = load_decoder(tmp_path, dtype=torch.float32, collective=collective)
        whole = plain.spec.num_kv_heads
        apply_balance(decoder, chosen.part(*collective.shard.kv_piece(whole)))
        return steps(decoder)

    for a, b in zip(on_ranks(2, balanced)[0], steps(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_balanced(tmp_path: Path) -> None:
    save(tmp_path, "qwen3")
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    uneven = random_balance(decoder, same=False)
    before = steps(decoder)
    with pytest.raises(ValueError, match="share their norm"):
        apply_balance(decoder, uneven)
    for a, b in zip(steps(decoder), before, strict=True):
        assert torch.equal(a, b)
    few_bits = load_model(tmp_path, dtype=torch.float32, quantization="int8")
    assert not can_be_balanced(few_bits)
    with pytest.raises(ValueError, match="weights in few bits"):
        apply_balance(few_bits, random_balance(decoder, same=True))
    apply_balance(few_bits, Balance.nothing((1, 1, 1)))  # which asks for nothing


def test_exponents_are_near_the_least_error() -> None:
    """Rounded to powers of two, factors of squares are off by two at most: so is, by Kantorovich's
    inequality, the product of both sums by 25 / 16."""
    g = torch.Generator().manual_seed(1)
    for _ in range(200):
        k, q = torch.exp(1.5 * torch.randn(2, 64, generator=g)).double()
        s = exponents(k.square(), q.square()).double().exp2()
        least = (k * q).sum().square()
        found = (q * s).square().sum() * (k / s).square().sum()
        assert least <= found * (1 + 1e-9)
        assert found <= 25 / 16 * least * (1 + 1e-9)


def test_dead_channels_do_no_harm() -> None:
    k = torch.ones(16)
    k[3] = 0.0
    assert exponents(k, torch.ones(16)).tolist() == [0] * 3 + [-LARGEST] + [0] * 12
    assert exponents(torch.zeros(16), torch.zeros(16)).tolist() == [0] * 16


def test_pairs_share_what_they_have() -> None:
    assert paired(torch.tensor([1.0, 2.0, 10.0, 20.0])).tolist() == [11.0, 22.0, 11.0, 22.0]


def test_outliers_are_taken_back() -> None:
    """The bundled model with channels that stand out loses as little as without them."""
    decoder = load_decoder(TARGET, dtype=torch.float32)
    reader = Reader(decoder, TorchOps(), torch.float32, CPU)
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(decoder.spec.vocab_size, (200,), generator=g).tolist()

    def divergence() -> float:
        spec, found = decoder.spec, Distance()
        shape = (spec.num_layers, spec.num_kv_heads, PAGE, spec.head_dim)
        dense, few = (
            reader.log_probabilities(tokens, layer_formats(name, *shape))[:-1]
            for name in ("auto", "int4h")
        )
        found.add(few, dense, torch.tensor(tokens[1:]))
        return found.divergence / found.tokens

    plain = divergence()
    inject_outliers(decoder)
    worse = divergence()
    assert worse > 2.5 * plain
    dense = reader.log_probabilities(tokens, layer_formats("auto", 6, 2, PAGE, 128))
    assert balance(reader, [tokens]).changes
    assert torch.equal(
        reader.log_probabilities(tokens, layer_formats("auto", 6, 2, PAGE, 128)), dense
    )
    assert divergence() < 1.5 * plain
