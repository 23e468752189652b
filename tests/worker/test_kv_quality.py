"""Reading a text from pages of different formats, and the means of keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernels.kv.balance import Balance
from kernels.kv.calibration import Calibration
from kernels.kv.presets import layer_formats
from kernels.kv.scales import HEADROOM, HeadScales
from kernels.torch_ops import TorchOps
from models.balance import apply_balance
from models.loader import load_decoder
from tests.e2e.test_exactness import CPU, SPEC, VOCAB, decoder
from tests.models.checkpoints import save
from worker.kv_moments import SINKS, head_scales, key_means
from worker.kv_pool import allocate_pool
from worker.kv_quality import PAGE, Distance, Reader, one_row

LAYERS = range(SPEC.num_layers)
TOKENS = [int(t) for t in torch.randint(VOCAB, (230,), generator=torch.Generator().manual_seed(4))]


def reader() -> Reader:
    return Reader(decoder("auto"), TorchOps(), torch.float32, CPU)


def formats(name: str, calibration: Calibration | None = None):
    return layer_formats(name, SPEC.num_layers, 2, PAGE, 16, None, calibration)


def test_more_bits_are_nearer_to_dense_pages() -> None:
    dense = reader().log_probabilities(TOKENS, formats("auto"))
    torch.testing.assert_close(dense.exp().sum(-1), torch.ones(len(TOKENS)))
    following = torch.tensor(TOKENS[1:])
    moved = []
    for name in ("auto", "int8n", "int4h", "int2h"):
        found = Distance()
        other = reader().log_probabilities(TOKENS, formats(name))
        found.add(other[:-1], dense[:-1], following)
        assert found.tokens == len(TOKENS) - 1
        moved.append(found.divergence)
    assert moved[0] == 0.0
    assert moved == sorted(moved)


def test_means_are_those_of_the_keys_behind_the_first_ones() -> None:
    texts = [TOKENS, TOKENS[:100], TOKENS[:30]]  # the last one has no key that counts
    found = key_means(reader(), texts)
    keys = [torch.cat([dense_pages(t)[layer][0, :, SINKS:] for t in texts], 1) for layer in LAYERS]
    for layer in LAYERS:
        torch.testing.assert_close(found[layer], keys[layer].mean(1))


def dense_pages(tokens: list[int]) -> list[torch.Tensor]:
    """Of each layer, keys and values: [2, kv_heads, tokens, head_dim]."""
    pages = -(-len(tokens) // PAGE)
    kv = allocate_pool(SPEC, pages + 1, PAGE, torch.float32, CPU)
    decoder("auto")(torch.tensor(tokens), one_row(0, len(tokens), pages), kv, TorchOps())
    by_head = (pool[1:].permute(1, 2, 0, 3, 4).flatten(2, 3) for pool in kv)
    return [stored[:, :, : len(tokens)] for stored in by_head]


def test_scales_are_those_of_the_largest_numbers_stored() -> None:
    """Those of the first positions count, too."""
    texts = [TOKENS[:100], TOKENS[50:90]]
    means = torch.randn(SPEC.num_layers, 2, 16, generator=torch.Generator().manual_seed(1)) * 40
    found = head_scales(reader(), texts, means)
    for layer in LAYERS:
        stored = torch.cat([dense_pages(tokens)[layer] for tokens in texts], 2)
        stored[0] -= means[layer][:, None]
        room = HEADROOM * stored.abs().amax((2, 3)).double()
        held = 448 * torch.stack([found.keys[layer], found.values[layer]]).double().exp2()
        assert bool(((room <= held) & (held < 2 * room)).all())


def test_heads_of_all_sizes_are_read_alike_with_scales(tmp_path: Path) -> None:
    """Keys and values that the weights make larger by powers of two, head by head, give the same
    words bit for bit with scales that are as much larger, and others without."""
    save(tmp_path, "llama")
    plain, changed = (
        Reader(load_decoder(tmp_path, dtype=torch.float32), TorchOps(), torch.float32, CPU)
        for _ in range(2)
    )
    spec, g = plain.model.spec, torch.Generator().manual_seed(1)
    shape = (spec.num_layers, spec.num_kv_heads, spec.head_dim)
    means, tokens = torch.zeros(shape), [token % spec.vocab_size for token in TOKENS]
    larger = torch.randint(-12, 13, (2, *shape[:2], 1), generator=g)
    keys, values = -larger.expand(2, *shape)
    apply_balance(changed.model, Balance(keys, values))
    ordinary, other = (head_scales(reader, [tokens], means) for reader in (plain, changed))
    assert torch.equal(other.keys, ordinary.keys + larger[0, ..., 0])
    assert torch.equal(other.values, ordinary.values + larger[1, ..., 0])

    def words(of: Reader, name: str, scales: HeadScales | None = None) -> torch.Tensor:
        fitted = None
        if scales is not None:
            fitted = Calibration(name, (), means, Balance.nothing(shape), scales)
        layers, heads, dim = shape
        forms = layer_formats(name, layers, heads, PAGE, dim, None, fitted)
        return of.log_probabilities(tokens, forms).exp()

    dense = words(plain, "auto")
    assert torch.equal(words(changed, "auto"), dense)
    scaled = words(plain, "fp8", ordinary)
    assert torch.equal(words(changed, "fp8", other), scaled)
    lost, kept = ((found - dense).abs().sum() for found in (words(changed, "fp8"), scaled))
    assert lost > 5 * kept


def test_means_change_no_score_but_what_rounding_does() -> None:
    """Means of ten, far from the keys: eight bits of what is left still tell the keys apart."""
    means = torch.full((SPEC.num_layers, 2, 16), 0.5)
    fitted = Calibration("int8n", (), means, Balance.nothing(means.shape))
    plain = reader().log_probabilities(TOKENS, formats("int8n"))
    moved = reader().log_probabilities(TOKENS, formats("int8n", fitted))
    assert (plain.exp() - moved.exp()).abs().max() < 0.02


@pytest.mark.parametrize(
    ("kv_format", "layers", "ends"),
    [
        ("int8n", 36, 0),
        ("k8v4", 36, 0),
        ("int4h", 36, 2),
        ("int4h", 12, 1),
        ("int4h", 6, 0),
        ("k4v2h", 6, 1),
        ("k4v2h", 36, 2),
        ("int2h", 3, 0),
        ("oscar2", 6, 1),
        ("oscar2", 36, 2),
    ],
)
def test_first_and_last_layers_have_eight_bits(kv_format: str, layers: int, ends: int) -> None:
    wide = layer_formats("int8n", 1, 2, PAGE, 64)[0].name
    names = [form.name for form in layer_formats(kv_format, layers, 2, PAGE, 64)]
    if kv_format != "int8n":
        assert [name == wide for name in names] == [
            min(i, layers - 1 - i) < ends for i in range(layers)
        ]
    asked = [form.name for form in layer_formats(kv_format, layers, 2, PAGE, 64, 1)]
    assert asked[0] == asked[-1] == wide


def test_a_calibration_survives_its_file() -> None:
    means = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(1)) * 100
    found = Calibration.parse(
        Calibration("int4h", (0, 2), means, Balance.nothing(means.shape)).dump()
    )
    assert (found.kv_format, found.eight_bit_layers) == ("int4h", (0, 2))
    torch.testing.assert_close(found.key_means, means, rtol=1e-5, atol=0)
    assert found.scales is None


def scaled(keys: list[list[int]], values: list[list[int]]) -> Calibration:
    means = torch.zeros(len(keys), 2, 16)
    scales = HeadScales(torch.tensor(keys), torch.tensor(values))
    return Calibration("fp8", (), means, Balance.nothing(means.shape), scales)


def test_scales_of_heads_survive_a_calibration_s_file() -> None:
    found = Calibration.parse(scaled([[0, -3], [5, 1]], [[2, 2], [0, -64]]).dump())
    assert found.scales is not None
    assert found.scales.keys.tolist() == [[0, -3], [5, 1]]
    assert found.scales.values.tolist() == [[2, 2], [0, -64]]
    forms = layer_formats("fp8", 2, 2, PAGE, 16, None, found)
    assert len({form.name for form in forms}) == 2


def test_calibrations_that_are_refused() -> None:
    """Old ones, scales that cannot be, and none where there must be some."""
    good = json.loads(scaled([[0, 1]], [[2, 3]]).dump())
    for change, said in (
        ({"version": 2}, "of version 2, not 3"),
        ({"key_scale_exponents": [[0]]}, "exponents of scales"),
        ({"value_scale_exponents": [[0, 65]]}, "exponents of scales"),
        ({"value_scale_exponents": None}, "no calibration"),
    ):
        with pytest.raises(ValueError, match=said):
            Calibration.parse(json.dumps(good | change))
    with pytest.raises(ValueError, match="no calibration"):
        Calibration.parse(json.dumps({k: good[k] for k in good if k != "key_scale_exponents"}))
    none = good | {"key_scale_exponents": None, "value_scale_exponents": None}
    with pytest.raises(ValueError, match="no scales of heads"):
        layer_formats("fp8", 1, 2, PAGE, 16, None, Calibration.parse(json.dumps(none)))
    other = Calibration.parse(json.dumps(good | {"kv_format": "int4h"}))
    with pytest.raises(ValueError, match="scales of their own"):
        layer_formats("int4h", 1, 2, PAGE, 16, None, other)
