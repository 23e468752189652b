"""Checkpoints as they come: sharded, damaged, incomplete, in other formats."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import CheckpointError
from models.loader import load_decoder
from models.weights import load_weights, resolve_checkpoint
from tests.models.checkpoints import Paged, expected_logits, save


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path, "qwen3", tie_word_embeddings=True)
    return tmp_path


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the dictionary of tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        load_decoder(folder, dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_sharded_equals_whole(tmp_path: Path) -> None:
    model = save(tmp_path, "llama", shard_size="60KB", tie_word_embeddings=False)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    said: list[str] = []
    decoder = load_decoder(tmp_path, dtype=torch.float32, progress=said.append)
    ids = torch.arange(3, 40)
    found = Paged(decoder, [ids]).step([(0, 0, len(ids))])[0]
    torch.testing.assert_close(found, expected_logits(model, ids), atol=2e-4, rtol=2e-4)
    assert len(said) == len(list(tmp_path.glob("*.safetensors")))


def test_converts_the_dtype(checkpoint: Path) -> None:
    decoder = load_decoder(checkpoint, dtype=torch.bfloat16)
    stored = load_file(checkpoint / "model.safetensors")
    assert all(p.dtype == torch.bfloat16 for p in decoder.parameters())
    assert torch.equal(decoder.norm, stored["model.norm.weight"].bfloat16())


def test_every_parameter_is_a_target_once(checkpoint: Path) -> None:
    decoder = load_decoder(checkpoint, dtype=torch.float32, load_format="dummy")
    targets = decoder.targets()
    assert sum(t.numel() for t in targets.values()) == sum(p.numel() for p in decoder.parameters())


def test_dummy_weights_need_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    first, again, other = (
        load_decoder(checkpoint, dtype=torch.float32, load_format="dummy", seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.embedding, again.embedding)
    assert not torch.equal(first.embedding, other.embedding)
    ids = torch.arange(3, 20)
    assert Paged(first, [ids]).step([(0, 0, 17)])[0].isfinite().all()


def test_a_stored_tied_head_and_old_buffers_are_ignored(checkpoint: Path) -> None:
    def add(tensors: dict) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    rewrite(checkpoint, add)
    load_decoder(checkpoint, dtype=torch.float32)


def test_the_same_weights_in_another_layout_are_ignored(checkpoint: Path) -> None:
    save_file({"tok_embeddings.weight": torch.ones(2)}, checkpoint / "consolidated.safetensors")
    load_decoder(checkpoint, dtype=torch.float32)


def test_native_models_do_not_import_transformers(checkpoint: Path) -> None:
    script = (
        "import sys, pathlib, torch; from models.loader import load_decoder; "
        f"load_decoder(pathlib.Path({str(checkpoint)!r}), dtype=torch.float32); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=110).returncode == 0


def test_missing_tensor(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    refused(checkpoint, r"lacks model\.layers\.1\.self_attn\.k_proj\.weight")


def test_unexpected_tensor(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda t: t.update({"model.layers.9.oddity": torch.ones(1)}))
    refused(checkpoint, r"no place for: model\.layers\.9\.oddity")


def test_wrong_shape(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda t: t.update({"model.norm.weight": torch.ones(7)}))
    refused(checkpoint, r"model\.norm\.weight has shape \[7\]")


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_truncated_file(checkpoint: Path, keep: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(checkpoint, "damaged or incomplete")


def test_absent_shard(tmp_path: Path) -> None:
    save(tmp_path, "qwen3", shard_size="60KB", tie_word_embeddings=True)
    next(iter(sorted(tmp_path.glob("model-00002*")))).unlink()
    refused(tmp_path, "model-00002.*index.json names")


def test_broken_index(tmp_path: Path) -> None:
    save(tmp_path, "qwen3", shard_size="60KB", tie_word_embeddings=True)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path, "no weight_map")


def test_index_that_leaves_the_folder(tmp_path: Path) -> None:
    save(tmp_path, "qwen3", shard_size="60KB", tie_word_embeddings=True)
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "outside")


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    refused(checkpoint, "safetensors, which cannot run code")


def test_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "has no config.json")


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    refused(checkpoint, "no safetensors file")


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_damaged_config(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    refused(checkpoint, r"config\.json")


def test_unknown_load_format(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="load_format 'pickle'"):
        load_decoder(checkpoint, dtype=torch.float32, load_format="pickle")


def test_tensors_are_read_one_at_a_time(checkpoint: Path) -> None:
    """A target sees its tensor before the next one is read."""

    class Order(dict):
        def get(self, name, default=None):
            assert all(t.isfinite().all() for t in seen)
            seen.append(found := super().get(name, default))
            return found

    seen: list[torch.Tensor] = []
    decoder = load_decoder(checkpoint, dtype=torch.float32)
    targets = decoder.targets()
    for target in targets.values():
        target.fill_(torch.nan)
    load_weights(checkpoint, Order(targets))
    assert len(seen) == len(targets)


def test_resolve_a_folder(checkpoint: Path) -> None:
    assert resolve_checkpoint(str(checkpoint)) == checkpoint


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_resolve_a_missing_folder(name: str) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve_checkpoint(name)


def test_resolve_a_file(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_checkpoint(str(checkpoint / "config.json"))


def test_resolve_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict = {}

    def snapshot(name: str, *, revision, allow_patterns, ignore_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve_checkpoint("someone/some-model", "v2") == tmp_path
    assert (asked["name"], asked["revision"]) == ("someone/some-model", "v2")
    assert not any("bin" in pattern for pattern in asked["patterns"])


def test_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_, **__):
        raise ConnectionError("no route to host\nwith a long tail")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match="no route to host") as caught:
        resolve_checkpoint("someone/some-model")
    assert "\n" not in str(caught.value)
