"""What codecs of keys and values lose, against what theory says they lose."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.kv.codec import Affine, Codec, root
from kernels.kv.pack import pack, packed_bytes, unpack
from kernels.kv.paged import Paged
from kernels.kv.presets import PRESETS, LayerPages, Preset
from kernels.kv.rotation import Rotation
from kernels.kv.sealed import SealedPage
from kernels.kv.table import Float8, LloydMax, Octopus, codebook, triplets

N = 128
COUNT = 20_000

# Squared error over the vector's square for normal numbers, the cosine, and whether the norm is
# kept. Ranges whose values lie at their ends have .0100, .0080, .0061 and 3.4e-5 in theory.
EXPECTED = {
    LloydMax(2): (0.1190, 0.9405, True),
    LloydMax(3): (0.0338, 0.9831, True),
    LloydMax(4): (0.00918, 0.9954, True),
    Octopus(): (0.0485, 0.9757, True),
    Float8(): (7.0e-4, 0.9996, False),
    Affine(8): (3.6e-5, 0.99998, False),
    Affine(4): (0.0091, 0.9954, True),
    Affine(4, group=64): (0.0077, 0.9961, True),
    Affine(4, group=32): (0.0062, 0.9968, True),
    Affine(2, clip=1.5): (0.1200, 0.9397, True),
}
CODECS = pytest.mark.parametrize("codec", EXPECTED, ids=lambda codec: codec.name)
FORMATS = PRESETS | {"octopus beside fp8": Preset(Octopus, Float8)}


@lru_cache(maxsize=1)
def normal() -> Tensor:
    """[COUNT, N]"""
    return torch.randn(COUNT, N, generator=torch.Generator().manual_seed(0))


def nmse(x: Tensor, found: Tensor) -> float:
    return float((x - found).square().sum() / x.square().sum())


def paged(name: str, kv_heads: int = 2, page_size: int = 16, mean: Tensor | None = None) -> Paged:
    return FORMATS[name].form(LayerPages(kv_heads, page_size, N, mean))


# Codebooks


@pytest.mark.parametrize(
    ("bits", "n", "expected"),
    [
        (1, 128, [0.79944]),
        (2, 64, [0.45212, 1.49997]),
        (2, 128, [0.45245, 1.50519]),
        (3, 96, [0.24420, 0.75244, 1.33417, 2.12472]),
        (3, 128, [0.24442, 0.75333, 1.33660, 2.13147]),
        (
            4,
            128,
            [0.12787, 0.38638, 0.65362, 0.93710, 1.24777, 1.60434, 2.04593, 2.68886],
        ),
        (
            4,
            256,
            [0.12813, 0.38721, 0.65519, 0.93971, 1.25199, 1.61117, 2.05741, 2.71057],
        ),
    ],
)
def test_codebooks_of_the_sphere(bits: int, n: int, expected: list[float]) -> None:
    """Against numbers of another solver, which integrates on a grid."""
    found = codebook(bits, n)
    assert found[len(expected) :] == pytest.approx(expected, abs=1.5e-5)
    assert [-c for c in reversed(found[: len(expected)])] == list(found[len(expected) :])


def test_codebooks_of_long_vectors_are_those_of_a_normal_number() -> None:
    assert codebook(2, 8192)[2:] == pytest.approx([0.45278, 1.51042], abs=2e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("n", [8, 80, 129])
def test_centroids_are_the_means_of_their_cells(bits: int, n: int) -> None:
    """Lloyd's condition, with the density summed up on a grid."""
    t = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 1_000_000 - 1
    density = (1 - t * t) ** ((n - 3) / 2)
    centroids = torch.tensor(codebook(bits, n), dtype=torch.float64) / math.sqrt(n)
    cell = torch.bucketize(t, (centroids[1:] + centroids[:-1]) / 2)
    mass = torch.zeros_like(centroids).index_add_(0, cell, density)
    moment = torch.zeros_like(centroids).index_add_(0, cell, density * t)
    torch.testing.assert_close(moment / mass, centroids, rtol=0, atol=1e-6)


def test_the_nearest_of_all_triplets_is_chosen() -> None:
    """What sixteen directions and a radius find, a search through all entries finds."""
    x = normal()[:64, :96]  # 96: no triplet is filled up with zeros
    codec = Octopus()
    code = codec.encode(x)
    unit = x / x.norm(dim=-1, keepdim=True) * math.sqrt(96)
    table = torch.from_numpy(triplets(96)).float()
    away = (unit.unflatten(-1, (-1, 1, 3)) - table).square().sum(-1)
    chosen = away.gather(-1, code.high.long()[..., None])[..., 0]
    torch.testing.assert_close(chosen, away.amin(-1), rtol=1e-4, atol=1e-5)
    assert len(table.unique(dim=0)) == 256


def test_the_table_of_triplets_stays_as_it_is() -> None:
    """Stored pages depend on it."""
    found = triplets(128)[[0, 77, 255]].tolist()
    assert found[0] == pytest.approx([0.1508244, 0.1508244, 0.7533885], abs=2e-7)
    assert found[1] == pytest.approx([-0.9040780, 0.9040780, 0.5477724], abs=2e-7)
    assert found[2] == pytest.approx([-0.5302642, -0.5302642, -2.6491038], abs=2e-7)


# Errors


@CODECS
def test_error_and_cosine(codec: Codec) -> None:
    expected, cosine, keeps_norm = EXPECTED[codec]
    x = normal()
    found = codec.decode(codec.encode(x))
    assert 0.97 * expected < nmse(x, found) < 1.02 * expected
    assert torch.cosine_similarity(x, found).mean() > cosine - 2e-4
    if keeps_norm:
        torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("codec", "table"),
    [(Affine(8), 3.4e-5), (Affine(4), 0.00997), (Affine(4, group=64), 0.0080)],
    ids=["8", "4", "4 in groups of 64"],
)
def test_middles_of_cells_against_ends_of_ranges(codec: Codec, table: float) -> None:
    """Sixteen cells are better read in their middles; in 256 it makes no odds."""
    assert 0.85 * table < nmse(normal(), codec.decode(codec.encode(normal()))) < 1.08 * table


def test_two_bits_need_more_than_a_range() -> None:
    """The negative control: values at the ends of a range of two bits."""
    x = normal()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / 3
    by_ends = nmse(x, low + ((x - low) / scale).round() * scale)
    by_range = nmse(x, Affine(2).decode(Affine(2).encode(x)))
    by_clip = nmse(x, Affine(2, clip=1.5).decode(Affine(2, clip=1.5).encode(x)))
    assert 0.2 < by_ends < 0.3
    assert 1.1 * by_clip < by_range < 0.7 * by_ends


@CODECS
def test_error_of_scores(codec: Codec) -> None:
    """It is noise, as large as the error of keys says, beside a shrinkage that is bounded.

    Ranges shrink most: their outermost values come back from the middles of the outermost cells."""
    x = normal()
    q = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = codec.decode(codec.encode(x))
    right, error = (q * x).sum(-1), (q * (found - x)).sum(-1)
    lost = nmse(x, found)
    expected = q.norm(dim=-1) * x.norm(dim=-1) * math.sqrt(lost / N)
    ratio = error.square().sum().sqrt() / expected.square().sum().sqrt()
    assert float(ratio) == pytest.approx(1, abs=0.05)
    slope = float((q * found).sum(-1) @ right / (right @ right))
    _, _, keeps_norm = EXPECTED[codec]
    shrinkage = 1 - math.sqrt(1 - lost) if keeps_norm else 3 * lost
    noise = 3 * math.sqrt(lost / COUNT)
    assert abs(slope - 1) <= shrinkage + 1e-3 + noise


def test_the_upper_half_of_eight_bits_is_a_code_of_four() -> None:
    x, codec = normal(), Affine(8)
    coarse = nmse(x, codec.decode(codec.encode(x), coarse=True))
    assert coarse == pytest.approx(0.0092, rel=0.03)


@pytest.mark.parametrize("group", [16, 32])
def test_error_of_sealed_pages(group: int) -> None:
    """Both are affine codes of groups, of keys along tokens."""
    pages = normal()[:12_800].view(2, 50, 2, 64, N)
    page = SealedPage(2, 64, N, group)
    keys, values = page.decode(page.encode(*pages))
    grouped = Affine(2, group)
    expected = nmse(pages, grouped.decode(grouped.encode(pages)))
    assert nmse(pages[0], keys) == pytest.approx(expected, rel=0.03)
    assert nmse(pages[1], values) == pytest.approx(expected, rel=0.03)


def test_sealed_pages_take_channels_and_norms_of_their_own() -> None:
    """Neither a channel's mean nor small tokens of keys cost the others anything."""
    x = normal()[: 50 * 64].view(50, 1, 64, N)
    page = SealedPage(1, 64, N)
    plain, _ = page.decode(page.encode(x, x))
    tokens, mean = torch.ones(64, 1), torch.zeros(N)
    tokens[:4] = 1 / 64  # of which norms in 16 bits keep all digits
    mean[3] = 30.0
    small, _ = page.decode(page.encode(x * tokens, x))
    assert torch.equal(small / tokens, plain)
    shifted, _ = page.decode(page.encode(x + mean, x))
    others = [i for i in range(N) if i != 3]
    assert nmse(x[..., others], shifted[..., others]) < 1.1 * nmse(x, plain)
    by_vector = Affine(2, clip=1.5)
    lost = by_vector.decode(by_vector.encode(x + mean))
    assert nmse(x[..., others], lost[..., others]) > 5 * nmse(x, plain)


# Numbers that are not like others


@CODECS
def test_zeros_and_extremes(codec: Codec) -> None:
    x = torch.zeros(6, N)
    x[1, 5] = 1.0
    x[2] = 3.0
    x[3] = normal()[0] * 1e-3
    x[4] = normal()[0] * 100
    x[5] = normal()[0] * 1e-30
    found = codec.decode(codec.encode(x))
    assert found.isfinite().all()
    assert not found[0].any()
    assert found[5].abs().max() < 1e-6
    if codec.name != "e4m3":  # whose smallest numbers are 0.002 apart
        ratio = nmse(x[3], found[3]) / nmse(x[4], found[4])
        assert ratio == pytest.approx(1, rel=0.2)


def test_large_numbers_saturate() -> None:
    x = torch.tensor([[1e4, -1e4, 448.0, 464.0, 500.0, -3.0, 0.0, 1.0]])
    codec = Float8()
    found = codec.decode(codec.encode(x))
    assert found.tolist() == [[448.0, -448.0, 448.0, 448.0, 448.0, -3.0, 0.0, 1.0]]


@CODECS
def test_vectors_are_coded_by_themselves(codec: Codec) -> None:
    """The bits of a code do not depend on how many vectors there are, or on their order."""
    x = normal()[:60].view(3, 4, 5, N)
    code = codec.encode(x)
    sizes = codec.sizes(N)
    assert [part.shape for part in code] == [(3, 4, 5, size) for size in sizes]
    decoded = codec.decode(code)
    for index in ((0, 0, 0), (1, 3, 2), (2, 3, 4)):
        alone = codec.encode(x[index].clone())
        assert all(torch.equal(part[index], one) for part, one in zip(code, alone, strict=True))
        assert torch.equal(codec.decode(alone), decoded[index])
    turned = codec.encode(x.transpose(0, 2))
    for part, other in zip(code, turned, strict=True):
        assert torch.equal(part.transpose(0, 2), other)


@CODECS
def test_codes_of_what_was_decoded(codec: Codec) -> None:
    """They are the same codes; of eight bits they may be one off, for the scale of a range gets
    smaller by a 256th: its outermost values are the middles of their cells."""
    code = codec.encode(normal()[:2000])
    again = codec.encode(codec.decode(code))
    if codec == Affine(8):
        high, low = ((unpack(c.high, 4).int() * 16 + unpack(c.low, 4).int()) for c in (code, again))
        assert (high - low).abs().max() <= 1
    else:
        assert torch.equal(again.high, code.high)
    if not isinstance(codec, Affine):
        assert torch.equal(again.numbers, code.numbers)


@pytest.mark.parametrize("codec", [LloydMax(3), Octopus()], ids=lambda codec: codec.name)
def test_vectors_that_do_not_fill_bytes(codec: Codec) -> None:
    for n in (8, 16, 64, 80, 96, 256):
        x = normal()[:100, :n] if n <= N else normal()[:200].view(100, n)
        found = codec.decode(codec.encode(x))
        assert found.shape == x.shape
        assert nmse(x, found) < 0.055
    for n in (0, 12, 127):
        with pytest.raises(ValueError, match="multiple of 8"):
            codec.sizes(n)


def test_roots_are_rounded_as_kernels_round_them() -> None:
    g = torch.Generator().manual_seed(4)
    x = torch.rand(1 << 16, generator=g).ldexp(torch.randint(-40, 40, (1 << 16,), generator=g))
    x[0] = 0.0
    assert np.array_equal(root(x).numpy(), np.sqrt(x.numpy()))


def test_what_there_is_no_codec_for() -> None:
    with pytest.raises(ValueError, match="2, 3 or 4 bits"):
        LloydMax(5)
    with pytest.raises(ValueError, match="groups of 32"):
        SealedPage(1, 16, N)
    with pytest.raises(ValueError, match="aligned"):  # an odd number of bytes
        Paged(1, 1, N, Octopus(), Float8(), rotated=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@CODECS
def test_on_a_gpu(codec: Codec) -> None:
    """The same but for vectors between two codes, for sums are in another order."""
    x = normal()[:1000]
    here, there = codec.encode(x), codec.encode(x.cuda())
    assert (here.high != there.high.cpu()).float().mean() < 1e-3
    found = codec.decode(there).cpu()
    assert nmse(x, found) == pytest.approx(nmse(x, codec.decode(here)), rel=1e-3)


# Packing


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from([2, 3, 4, 8]), st.data())
def test_packed_codes_come_back(bits: int, data: st.DataObject) -> None:
    n = 8 * data.draw(st.integers(1, 20))
    rows = data.draw(st.integers(1, 3))
    numbers = st.integers(0, (1 << bits) - 1)
    drawn = data.draw(st.lists(numbers, min_size=rows * n, max_size=rows * n))
    codes = torch.tensor(drawn, dtype=torch.uint8).view(rows, n)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_bytes(bits, n))
    assert torch.equal(unpack(packed, bits), codes)


def test_runs_of_dimensions_in_bytes() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [i | (i + 8) << 4 for i in range(8)]


# Pages


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int8n", 264),
        ("int4h", 136),
        ("int4h64", 144),
        ("k4v2h", 104),
        ("int2h", 72),
        ("k8v4", 200),
        ("fp8", 256),
        ("turbo4", 132),
        ("turbo3", 100),
        ("turbo2", 68),
        ("octopus", 90),
    ],
)
def test_bytes_of_a_token(name: str, expected: int) -> None:
    """Of one head of 128 numbers."""
    assert paged(name, kv_heads=2, page_size=16).page_shape(2, 16, N) == (expected * 32,)


def test_bytes_of_a_sealed_page() -> None:
    """96 for each token of a head, and its own norm."""
    page = SealedPage(2, 64, N)
    assert page.bytes == 98 * 2 * 64
    x = normal()[: 3 * 128].view(3, 2, 64, N)
    assert page.encode(x, x).shape == (3, page.bytes)


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_one_by_one_or_in_chunks(name: str) -> None:
    """Bit for bit, wherever they come to lie."""
    g = torch.Generator().manual_seed(2)
    tokens, heads, size = 40, 2, 8
    k, v = torch.randn(2, tokens, heads, N, generator=g)
    mean = torch.randn(heads, N, generator=g)
    form = paged(name, heads, size, mean)
    slots = (torch.randperm(6, generator=g)[:, None] * size + torch.arange(size)).flatten()
    pools = []
    for chunk in (1, 7, 64):
        pool = torch.zeros(6, *form.page_shape(heads, size, N), dtype=torch.uint8)
        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            form.append(k[part], v[part], pool, slots[:tokens][part])
        pools.append(pool)
    assert torch.equal(pools[0], pools[1])
    assert torch.equal(pools[0], pools[2])
    pages = (slots[:tokens:size] // size)[None]
    keys, values = form.gather(pools[0], pages)
    exact_keys, exact_values = form.turn(k - mean), form.turn(v)
    bound = 0.15
    assert nmse(exact_keys.transpose(0, 1), keys[0]) < bound
    assert nmse(exact_values.transpose(0, 1), values[0]) < bound
    assert nmse(v.transpose(0, 1), form.turn_back(values[0])) < bound


# The rotation


@pytest.mark.parametrize("n", [16, 64, 96, 128])
def test_the_rotation_is_orthonormal(n: int) -> None:
    rotation = Rotation(n)
    matrix = rotation.forth(torch.eye(n))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n), rtol=0, atol=1e-6)
    torch.testing.assert_close(rotation.back(matrix), torch.eye(n), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)], ids=["fp32", "bf16"]
)
def test_turned_queries_have_the_same_scores(dtype: torch.dtype, bound: float) -> None:
    form = paged("int8n")
    assert form.rotation is not None
    k = normal()[:4000]
    q = normal()[4000:8000].to(dtype)
    turned = form.turn(q)
    assert turned.dtype == dtype
    right = (q.float() * k).sum(-1)
    found = (turned.float() * form.rotation.forth(k)).sum(-1)
    sizes = q.float().norm(dim=-1) * k.norm(dim=-1)
    assert ((found - right).abs() / sizes).max() < bound


def test_a_mean_key_shifts_all_scores_of_a_query_alike() -> None:
    g = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 64, 2, N, generator=g)
    mean = 5 * torch.randn(2, N, generator=g)
    q = torch.randn(2, N, generator=g)
    attention = []
    for shift in (None, mean):
        form = paged("int8n", mean=shift)
        pool = torch.zeros(4, *form.page_shape(2, 16, N), dtype=torch.uint8)
        form.append(k + mean, v, pool, torch.arange(64))
        keys, _ = form.gather(pool, torch.arange(4)[None])
        scores = torch.einsum("hd,hnd->hn", form.turn(q), keys[0]) / math.sqrt(N)
        attention.append(scores.softmax(-1))
    exact = (torch.einsum("hd,nhd->hn", q, k) / math.sqrt(N)).softmax(-1)
    torch.testing.assert_close(attention[1], exact, rtol=0.05, atol=1e-3)
    away, without = ((found - exact).abs().sum() for found in reversed(attention))
    assert away < without / 2  # smaller keys, smaller steps
