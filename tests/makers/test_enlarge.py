"""An enlarged checkpoint computes the small one's function."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from makers.enlarge import SHAPES, Size, enlarge, place_heads

transformers = pytest.importorskip("transformers")

SMALL = Size(hidden=48, layers=2, heads=8, kv_heads=2, intermediate=80, vocab=200)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 checkpoint with tied embeddings and uneven norms, in float32."""
    folder = tmp_path_factory.mktemp("small")
    config = transformers.Qwen3Config(
        hidden_size=SMALL.hidden,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.heads,
        num_key_value_heads=SMALL.kv_heads,
        intermediate_size=SMALL.intermediate,
        vocab_size=SMALL.vocab,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name else torch.randn_like(p) * 0.2)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits [4, 24, vocab] on fixed tokens, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokens = torch.randint(SMALL.vocab, (4, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits.float()


@pytest.mark.parametrize(
    "large",
    [
        Size(96, 4, 4, 4, 128, 500),  # one query head per KV head: every KV head four times
        Size(49, 2, 8, 4, 80, 200),  # two per KV head: every KV head twice
        Size(128, 3, 16, 2, 96, 201),  # eight per KV head
        Size(64, 2, 12, 4, 80, 200),  # three per KV head, which four do not divide into
        Size(64, 2, 9, 3, 80, 200),  # the same with too few KV heads: refused
    ],
    ids=str,
)
def test_same_logits(small: Path, tmp_path: Path, large: Size) -> None:
    if len(place_heads(SMALL, large)[1]) > large.kv_heads:
        with pytest.raises(SystemExit):
            enlarge(small, tmp_path / "large", large)
        return
    enlarge(small, tmp_path / "large", large, dtype="float32", shard_bytes=100_000)
    want, got = logits(small), logits(tmp_path / "large")
    torch.testing.assert_close(
        got[..., : SMALL.vocab], want, rtol=0, atol=2e-6 * float(want.abs().max()) + 2e-5
    )
    assert (got.argmax(-1) == want.argmax(-1)).all()
    if large.vocab > SMALL.vocab:
        assert float(got[..., SMALL.vocab :].max()) < float(want.min()) - 60


def test_bf16_within_rounding(small: Path, tmp_path: Path) -> None:
    enlarge(small, tmp_path / "large", Size(128, 3, 8, 4, 96, 300))
    exact, rounded = logits(small), logits(small, torch.bfloat16)
    got = logits(tmp_path / "large", torch.bfloat16)[..., : SMALL.vocab]
    noise = (rounded - exact).square().mean().sqrt()
    assert (got - exact).square().mean().sqrt() < 2 * noise


def test_layout(small: Path, tmp_path: Path) -> None:
    """Shards with an index, untied embeddings, copied tokenizer, the same bytes for a seed."""
    large = Size(96, 3, 8, 4, 128, 500)
    for name in ("a", "b"):
        enlarge(small, tmp_path / name, large, shard_bytes=100_000, seed=3)
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["hidden_size"] == 96
    assert (tmp_path / "a/tokenizer.json").exists()
    with pytest.raises(SystemExit, match="not empty"):
        enlarge(small, tmp_path / "a", large)


def test_bundled_models_fit_the_named_shapes() -> None:
    """Target and draft go into every named shape."""
    for bundled in (Size(320, 6, 8, 2, 640, 4096), Size(128, 3, 2, 1, 384, 4096)):
        for large in SHAPES.values():
            assert len(place_heads(bundled, large)[1]) <= large.kv_heads


def test_command_line(small: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "makers.enlarge",
        str(small),
        str(tmp_path / "out"),
        "--hidden",
        "64",
        "--vocab",
        "256",
        "--dtype",
        "float32",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=50)
    want, got = logits(small), logits(tmp_path / "out")
    torch.testing.assert_close(got[..., : SMALL.vocab], want, rtol=0, atol=1e-4)
