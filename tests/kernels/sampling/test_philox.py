"""The noise: published and own known answers, range, sensitivity, distribution."""

import math

import pytest
import torch

from kernels.sampling.philox import (
    GUMBEL_MAX,
    GUMBEL_MIN,
    gumbel,
    noise_blocks,
    noise_uniform,
    philox4x32,
    uniform_from_word,
)
from tests.kernels.sampling import oracle

# kat_vectors of the Random123 distribution, "philox4x32 10".
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def hex_words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def noise(seed: int, choice: int, position: int, tokens: list[int]) -> torch.Tensor:
    seed -= 2**64 if seed >= 2**63 else 0
    t = torch.tensor(tokens)
    return gumbel(noise_uniform(t, *(torch.full_like(t, x) for x in (seed, choice, position))))


@pytest.mark.parametrize(("counter", "key", "answer"), PUBLISHED)
def test_published_known_answers(counter: str, key: str, answer: str):
    words = philox4x32(*(torch.tensor(w) for w in hex_words(counter) + hex_words(key)))
    assert [int(w) for w in words] == hex_words(answer)
    assert oracle.philox(hex_words(counter), hex_words(key)) == hex_words(answer)


def test_broadcast_shapes_change_no_bit():
    generator = torch.Generator().manual_seed(1)
    row = torch.randint(0, 2**32, (4, 5, 1), generator=generator)
    blocks = torch.arange(7)
    k0, k1 = row[2], row[3]
    small = philox4x32(blocks, row[0], row[1], torch.ones_like(row[0]), k0, k1)
    full = [x.expand(5, 7).contiguous() for x in (blocks[None], row[0], row[1], k0, k1)]
    large = philox4x32(*full[:3], torch.ones(5, 7, dtype=torch.int64), *full[3:])
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))


# The noise is a promise to whoever keeps a seed: these bits do not change. (seed, choice, position,
# token) and the float32 bit pattern of g.
FIXED = [
    ((0, 0, 0, 0), 0x3FCFD894),  # 1.623797
    ((0, 0, 0, 1), 0x40230169),  # 2.546961
    ((0, 0, 0, 2), 0xBFBEBA18),  # -1.490054
    ((0, 0, 0, 3), 0xBBF606F7),  # -0.007508
    ((0, 0, 1, 0), 0x3F7F13F2),  # 0.996398
    ((0, 1, 0, 0), 0xBF371619),  # -0.715181
    ((1, 0, 0, 0), 0x4025D36B),  # 2.591029
    ((2**32, 0, 0, 0), 0x3DF27D50),  # 0.118403
    ((2**64 - 1, 3, 8191, 4095), 0x3E853DC5),  # 0.260237
    ((0x0123456789ABCDEF, 127, 100_000, 151_935), 0xBE65BEF9),  # -0.224361
    ((42, 0, 17, 50_256), 0x3FA42411),  # 1.282351
]


@pytest.mark.parametrize(("key", "bits"), FIXED)
def test_fixed_noise(key: tuple[int, int, int, int], bits: int):
    seed, choice, position, token = key
    value = noise(seed, choice, position, [token])
    assert int(value.view(torch.int32)) & 0xFFFFFFFF == bits
    assert float(oracle.gumbel(seed, choice, position, token)) == float(value)


def test_matches_the_oracle_bit_for_bit():
    for seed, choice, position in ((0, 0, 1), (2**64 - 1, 7, 8191), (2**63, 1, 2**31)):
        tokens = [0, 1, 2, 3, 4, 4095, 151_935]
        expected = [float(oracle.gumbel(seed, choice, position, t)) for t in tokens]
        assert noise(seed, choice, position, tokens).tolist() == expected


def test_blocks_and_single_tokens_agree():
    seed, zero = torch.tensor([5, -6]), torch.zeros(2, dtype=torch.int64)
    v = noise_blocks(torch.arange(10), seed[:, None], zero[:, None], zero[:, None])
    for row in range(2):
        single = noise_uniform(torch.arange(40), seed[row], zero[row], zero[row])
        assert torch.equal(v[row], single)


def test_range():
    extremes = torch.tensor([0, 1, 2**31, 2**32 - 2**8, 2**32 - 1], dtype=torch.float32)
    v = uniform_from_word(extremes)
    assert v.min() == 2.0**-33
    assert v.max() == 1 - 2.0**-24
    g = gumbel(v)
    assert g.isfinite().all()
    assert g.min() > GUMBEL_MIN
    assert g.max() < GUMBEL_MAX
    # Monotone: the smallest word is the largest noise, so the extremes above bound every g.
    assert torch.equal(g, g.sort(descending=True).values)


def test_value_does_not_depend_on_where_it_stands_in_a_tensor():
    word = torch.randint(0, 2**32, (997,), generator=torch.Generator().manual_seed(2))
    v = uniform_from_word(word.to(torch.float32))
    whole = gumbel(v)
    one_by_one = torch.cat([gumbel(v[i : i + 1]) for i in range(len(v))])
    assert torch.equal(whole, one_by_one)
    assert torch.equal(whole[3:], gumbel(v[3:].clone()))


def test_every_key_word_matters():
    base = noise(1, 0, 5, list(range(64)))
    for seed, choice, position in ((2, 0, 5), (1 + 2**32, 0, 5), (1, 1, 5), (1, 0, 6)):
        other = noise(seed, choice, position, list(range(64)))
        assert not (other == base).any()


def test_gumbel_moments():
    seed = torch.tensor([[11]])
    zero = torch.zeros_like(seed)
    g = gumbel(noise_blocks(torch.arange(2**16), seed, zero, zero)).double()
    n = g.numel()
    euler = 0.5772156649015329
    assert abs(float(g.mean()) - euler) < 5 * math.pi / math.sqrt(6 * n)
    assert float(g.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)
