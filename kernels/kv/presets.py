"""The formats by their names, and which layer of a model gets which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernels.kv.codec import Affine, Codec
from kernels.kv.format import DENSE, KVFormat
from kernels.kv.paged import Paged

AUTO = "auto"  # dense, in the model's dtype
BOUNDARY = "int8n"  # what the first and last layers get where a format asks for it
FEW_LAYERS = 8  # a layer at each end for every so many, at most two


@dataclass(frozen=True, slots=True)
class Preset:
    """Codecs of keys and of values."""

    keys: Callable[[], Codec]
    values: Callable[[], Codec]
    rotated: bool = True
    boundary: bool = False  # the first and last layers want more bits


PRESETS = {
    "int8n": Preset(lambda: Affine(8), lambda: Affine(8)),
    "k8v4": Preset(lambda: Affine(8), lambda: Affine(4)),
    "int4h": Preset(lambda: Affine(4), lambda: Affine(4), boundary=True),
    "int4h64": Preset(lambda: Affine(4, group=64), lambda: Affine(4, group=64), boundary=True),
    "k4v2h": Preset(lambda: Affine(4), lambda: Affine(2, clip=1.5), boundary=True),
    "int2h": Preset(lambda: Affine(2, clip=1.5), lambda: Affine(2, clip=1.5), boundary=True),
}

HALVES = ("int8n", "k8v4")  # of which a coarse reading is another one


def layer_formats(
    name: str,
    num_layers: int,
    kv_heads: int,
    page_size: int,
    head_dim: int,
    boundary_layers: int | None = None,
) -> list[KVFormat]:
    """One for each layer. `boundary_layers` at each end get eight bits; None: as many as the format
    asks for. Raises ValueError, in a sentence, where a head does not suit the format."""
    if name == AUTO:
        return [DENSE] * num_layers
    if boundary_layers is None:
        asked = min(2, num_layers // FEW_LAYERS)
        boundary_layers = asked if PRESETS[name].boundary else 0
    ends = {i for i in range(num_layers) if min(i, num_layers - 1 - i) < boundary_layers}
    made = {
        preset: _paged(preset, kv_heads, page_size, head_dim)
        for preset in {name, *([BOUNDARY] if ends else [])}
    }
    return [made[BOUNDARY if i in ends else name] for i in range(num_layers)]


def _paged(name: str, kv_heads: int, page_size: int, head_dim: int) -> Paged:
    preset = PRESETS[name]
    try:
        return Paged(
            kv_heads,
            page_size,
            head_dim,
            preset.keys(),
            preset.values(),
            rotated=preset.rotated,
        )
    except ValueError as error:
        raise ValueError(f"the KV format {name} does not fit this model: {error}") from error
