"""The formats by their names, and which layer of a model gets which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from kernels.kv.calibration import Calibration
from kernels.kv.codec import Affine, Codec
from kernels.kv.format import DENSE, KVFormat
from kernels.kv.paged import Paged
from kernels.kv.scales import HeadScales
from kernels.kv.sealed import Sealed
from kernels.kv.table import Float8, LloydMax, Octopus
from kernels.kv.windows import Windows

AUTO = "auto"  # dense, in the model's dtype
BOUNDARY = "int8n"  # what the first and last layers get where a format asks for it
DEMOTED = "int8n"  # whose pages can be demoted
EVERY_LAYERS = 8  # a layer at each end for every so many, at most two
LEAST_LAYERS = 4  # a model of fewer has no ends to speak of


@dataclass(frozen=True, slots=True, eq=False)
class LayerPages:
    """What a preset makes a format object of: one layer's sizes, and what else was asked for."""

    kv_heads: int
    page_size: int
    head_dim: int
    key_mean: Tensor | None = None
    windows: Windows | None = None
    halves: bool = False  # pages can be demoted
    scales: HeadScales | None = None


@dataclass(frozen=True, slots=True)
class Preset:
    """Codecs of keys and of values, which code each token by itself."""

    keys: Callable[[], Codec]
    values: Callable[[], Codec]
    rotated: bool = True
    # The first and last layers want more bits: at least so many of them at each end. None: no.
    boundary: int | None = None
    scaled: bool = False  # a calibration finds a scale for each head

    def form(self, pages: LayerPages) -> Paged:
        """Raises ValueError for heads that the codecs do not take."""
        return Paged(
            *(pages.kv_heads, pages.page_size, pages.head_dim, self.keys(), self.values()),
            rotated=self.rotated,
            key_mean=pages.key_mean,
            windows=pages.windows,
            halves=pages.halves,
            scales=pages.scales,
        )


PRESETS = {
    "int8n": Preset(lambda: Affine(8), lambda: Affine(8)),
    "k8v4": Preset(lambda: Affine(8), lambda: Affine(4)),
    "int4h": Preset(lambda: Affine(4), lambda: Affine(4), boundary=0),
    "int4h64": Preset(lambda: Affine(4, group=64), lambda: Affine(4, group=64), boundary=0),
    "k4v2h": Preset(lambda: Affine(4), lambda: Affine(2, clip=1.5), boundary=1),
    "int2h": Preset(lambda: Affine(2, clip=1.5), lambda: Affine(2, clip=1.5), boundary=1),
    "fp8": Preset(Float8, Float8, rotated=False, scaled=True),
    "turbo4": Preset(lambda: LloydMax(4), lambda: LloydMax(4), boundary=0),
    "turbo3": Preset(lambda: LloydMax(3), lambda: LloydMax(3), boundary=1),
    "turbo2": Preset(lambda: LloydMax(2), lambda: LloydMax(2), boundary=1),
    "octopus": Preset(Octopus, Octopus, boundary=1),
}


@dataclass(frozen=True, slots=True)
class SealedPreset:
    """Pages that are sealed when they are full: see `Sealed`."""

    group: int  # tokens of a channel of keys, or channels of a value, that share a scale
    boundary: int | None = None  # as in `Preset`

    def form(self, pages: LayerPages) -> Sealed:
        """Raises ValueError for heads and pages that do not make groups, and without a window."""
        sizes = (pages.kv_heads, pages.page_size, pages.head_dim)
        windows = pages.windows or Windows(0, 0)
        return Sealed(*sizes, windows, group=self.group, key_mean=pages.key_mean)


SEALED = {"oscar2": SealedPreset(group=32, boundary=1)}
NAMES = (*PRESETS, *SEALED)

# Those whose heads get scales from a calibration.
SCALED = tuple(name for name, p in PRESETS.items() if p.scaled)
# Those of which a coarse reading is another one.
HALVES = tuple(name for name, p in PRESETS.items() if p.keys().sizes(128).low)


def layer_formats(
    name: str,
    num_layers: int,
    kv_heads: int,
    page_size: int,
    head_dim: int,
    boundary_layers: int | None = None,
    calibration: Calibration | None = None,
    sink: int = 0,
    window: int | None = None,
    halves: bool = False,
) -> list[KVFormat]:
    """One for each layer. `boundary_layers` at each end get eight bits; None: those that the
    calibration names, or as many as the format asks for. The others have dense windows, the first
    `sink` positions and blocks of `window`, if either is more than none; None: a page where pages
    are sealed, none elsewhere. `halves`: pages can be demoted. Raises ValueError, in a sentence,
    where a head or a page does not suit the format, a window the pages, the calibration the model,
    or pages cannot be demoted."""
    if halves and name != DEMOTED:
        raise ValueError(f"only pages of {DEMOTED} can be demoted, not those of {name}")
    if halves and (sink or window):
        raise ValueError("pages with dense windows beside them cannot be demoted")
    if calibration is not None:
        calibration.check(name, (num_layers, kv_heads, head_dim))
    if name == AUTO:
        if boundary_layers:
            raise ValueError("boundary layers get 8 bits beside a format of fewer, not dense pages")
        if sink or window:
            raise ValueError("windows are kept dense beside packed pages, and these are dense")
        return [DENSE] * num_layers
    if name not in NAMES:
        raise ValueError(f"there is no KV format {name!r}; there are {', '.join([AUTO, *NAMES])}")
    if boundary_layers is not None and boundary_layers < 0:
        raise ValueError(f"{boundary_layers} boundary layers are less than none")
    ends = boundary_layers
    if ends is None:
        ends = _ends((PRESETS | SEALED)[name].boundary, num_layers)
    wide = {i for i in range(num_layers) if min(i, num_layers - 1 - i) < ends}
    if boundary_layers is None and calibration is not None:
        wide = set(calibration.eight_bit_layers)
    if window is None:
        window = page_size if name in SEALED else 0
    windows = _windows(page_size, sink, window)
    means = [None] * num_layers if calibration is None else list(calibration.key_means)
    scales = [None] * num_layers if calibration is None else _scales(name, calibration)
    pages = LayerPages(kv_heads, page_size, head_dim, halves=halves)
    return [
        packed_format(BOUNDARY, replace(pages, key_mean=means[i]))
        if i in wide
        else packed_format(
            name, replace(pages, key_mean=means[i], windows=windows, scales=scales[i])
        )
        for i in range(num_layers)
    ]


def _scales(name: str, calibration: Calibration) -> list[HeadScales | None]:
    """Layer by layer."""
    found, layers = calibration.scales, len(calibration.key_means)
    if name in SCALED and found is None:
        raise ValueError(f"the calibration has no scales of heads, which are what {name} is for")
    return [None if found is None else found.layer(i) for i in range(layers)]


def _windows(page_size: int, sink: int, window: int) -> Windows | None:
    found = Windows(sink, window)
    if found.block % page_size:
        raise ValueError(f"a window of {found.block} tokens is no multiple of a page's {page_size}")
    return found if found.sink or found.block else None


def _ends(least: int | None, num_layers: int) -> int:
    if least is None or num_layers < LEAST_LAYERS:
        return 0
    return max(min(2, num_layers // EVERY_LAYERS), least)


def packed_format(name: str, pages: LayerPages) -> KVFormat:
    """One layer's format, by the name of a preset. Raises ValueError, in a sentence, for pages and
    heads that it does not take."""
    if name in SEALED:
        _check_sealed(name, pages)
    try:
        return (PRESETS | SEALED)[name].form(pages)
    except ValueError as error:
        raise ValueError(f"the KV format {name} does not fit this model: {error}") from error


def _check_sealed(name: str, pages: LayerPages) -> None:
    """Raises ValueError for what other options than the model's make possible."""
    group = SEALED[name].group
    if pages.windows is None or not pages.windows.block:
        raise ValueError(
            f"pages of {name} are read dense until they are full, which takes a window of the "
            "latest tokens: leave --kv-window out, or set it to a multiple of the page size"
        )
    if pages.page_size % group:
        raise ValueError(
            f"{name} stores keys in groups of {group} tokens of a page, which has "
            f"{pages.page_size}: set --page-size to a multiple of {group}"
        )
