"""Checkpoints: from a folder or hub id to filled parameters. Safetensors only.

Tensors are read one at a time and copied straight to their place in a fused parameter, so loading
needs the memory of the model and of its largest tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.errors import CheckpointError
from models.parallel import Cut

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
IGNORED = ["consolidated*", "original/*", "onnx/*"]  # the same weights once more
# Tensors that older exports carry though they follow from the configuration.
DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias)$")
DUMMY_STD = 0.02

Progress = Callable[[str], None]
NO_CUTS: Mapping[str, Cut] = {}


def resolve_checkpoint(model: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `model` itself, or the hub's snapshot of it.

    Raises `CheckpointError` when there is neither such a folder nor a snapshot to be had.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model} is a file; a checkpoint is a folder with a config.json.")
    if not HUB_ID.fullmatch(model) or model.startswith((".", "/")):
        raise CheckpointError(f"there is no folder {model}.")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=PATTERNS, ignore_patterns=IGNORED
            )
        )
    except Exception as error:  # network, authentication, unknown id: many unrelated types
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"there is no folder {model}, and the hub has no snapshot of it for us "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'})."
        ) from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Raises `CheckpointError` when the file is missing or not a JSON object."""
    path = folder / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {name}.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return found


def load_weights(
    folder: Path,
    targets: Mapping[str, Tensor],
    *,
    cuts: Mapping[str, Cut] = NO_CUTS,
    progress: Progress = lambda _: None,
) -> None:
    """Copies a checkpoint's tensors to their targets, converting the dtype.

    Of the tensors in `cuts` only that part is read. Raises `CheckpointError` when a file or a
    tensor is missing, damaged, of another shape, or when the checkpoint holds tensors that have no
    place in the model.
    """
    files = checkpoint_files(folder)
    missing = set(targets)
    unexpected: list[str] = []
    for i, path in enumerate(files, 1):
        progress(f"loading weights: {path.name} ({i} of {len(files)})")
        for name, tensor in read_tensors(path, cuts):
            target = targets.get(name)
            if target is None:
                unexpected.append(name)
                continue
            fill(target, name, tensor)
            missing.discard(name)
    if missing:
        raise CheckpointError(f"{folder} lacks {_list(missing)}.")
    check_unexpected(folder, unexpected)


def fill(target: Tensor, name: str, tensor: Tensor) -> None:
    """Copies a checkpoint's tensor to its place. Raises `CheckpointError` for another shape."""
    if target.shape != tensor.shape:
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)} where config.json implies {list(target.shape)}."
        )
    target.copy_(tensor)


def check_unexpected(folder: Path, names: Sequence[str]) -> None:
    """Raises `CheckpointError` for tensors of a checkpoint that were not used, unless they are
    known to be redundant."""
    # A tied head may be stored all the same.
    unexpected = [n for n in names if n != "lm_head.weight" and not DERIVED.match(n)]
    if unexpected:
        raise CheckpointError(
            f"{folder} holds tensors this architecture has no place for: {_list(unexpected)}."
        )


def dummy_weights(targets: Mapping[str, Tensor], seed: int = 0) -> None:
    """Random weights of the real shapes: matrices N(0, 0.02), norms one, biases zero."""
    for i, (name, target) in enumerate(targets.items()):
        # A seed a tensor, so that a tensor does not depend on those before it.
        fill_dummy(name, target, seed + i)


def fill_dummy(name: str, target: Tensor, seed: int) -> None:
    """One tensor of `dummy_weights`."""
    if target.dim() > 1:
        generator = torch.Generator(target.device).manual_seed(seed)
        target.normal_(0.0, DUMMY_STD, generator=generator)
    else:
        target.fill_(0.0 if name.endswith("bias") else 1.0)


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the order of their names.

    Raises `CheckpointError` when there are none or some are missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(folder, index.name).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{index} has no weight_map.")
        if any(Path(name).name != name for name in names.values()):
            raise CheckpointError(f"{index} names files outside its folder.")
        files = [folder / name for name in sorted(set(names.values()))]
    elif (folder / "model.safetensors").exists():
        # Nothing beside it counts: the same weights in a vendor's own layout, adapters.
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    absent = [path.name for path in files if not path.exists()]
    if absent:
        raise CheckpointError(f"{folder} lacks {_list(absent)}, which {index.name} names.")
    if not files:
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise CheckpointError(
                f"{folder} holds pickled weights (.bin or .pt) only; "
                "convert them to safetensors, which cannot run code when loaded."
            )
        raise CheckpointError(f"{folder} has no safetensors file.")
    return files


def read_tensors(path: Path, cuts: Mapping[str, Cut] = NO_CUTS) -> Iterator[tuple[str, Tensor]]:
    """Of one file, one after another; of those in `cuts` that part. Raises `CheckpointError`."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            for name in file.keys():  # noqa: SIM118 - not a mapping
                cut = cuts.get(name)
                if cut is None:
                    yield name, file.get_tensor(name)
                    continue
                stored = file.get_slice(name)
                shape = list(stored.get_shape())
                if shape[cut.dim : cut.dim + 1] != [cut.full]:
                    raise CheckpointError(
                        f"{name} has shape {shape} where config.json implies {cut.full} along "
                        f"dimension {cut.dim}."
                    )
                yield name, stored[cut.index]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or incomplete: {error}.") from error


def _list(names: set[str] | list[str]) -> str:
    """A few names and a count."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
