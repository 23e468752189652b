"""Reading a text from pages of different formats, and the means of keys."""

from __future__ import annotations

import pytest
import torch

from kernels.kv.balance import Balance
from kernels.kv.calibration import Calibration
from kernels.kv.presets import layer_formats
from kernels.torch_ops import TorchOps
from tests.e2e.test_exactness import CPU, SPEC, VOCAB, decoder
from worker.kv_moments import SINKS, key_means
from worker.kv_pool import allocate_pool
from worker.kv_quality import PAGE, Distance, Reader, one_row

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
    keys: list[list[torch.Tensor]] = [[] for _ in range(SPEC.num_layers)]
    for tokens in texts:
        pages = -(-len(tokens) // PAGE)
        kv = allocate_pool(SPEC, pages + 1, PAGE, torch.float32, CPU)
        decoder("auto")(torch.tensor(tokens), one_row(0, len(tokens), pages), kv, TorchOps())
        for layer, pool in enumerate(kv):
            stored = pool[1:, 0].transpose(0, 1).flatten(1, 2)[:, : len(tokens)]
            keys[layer].append(stored[:, SINKS:])
    for layer in range(SPEC.num_layers):
        torch.testing.assert_close(found[layer], torch.cat(keys[layer], dim=1).mean(1))


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
