"""Rotary embedding parameters from a checkpoint's configuration, and the tables made of them.

Both spellings are read: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters`
(transformers 5). A table is made once, for the longest sequence that will be served: cached keys
are already rotated, so frequencies that changed with the current length (dynamic NTK, LongRoPE)
would disagree with the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.errors import CheckpointError, UnsupportedArchitecture

SCALINGS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """What the frequencies are made of. Unused fields keep their defaults."""

    theta: float = 10_000.0
    scaling: str = "default"  # one of SCALINGS
    factor: float = 1.0
    max_position: int = 0  # of the configuration
    original_max_position: int = 0  # the length of the original training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn: rotations over the original length
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()  # longrope, one per frequency
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0  # cosines and sines are multiplied by it

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> RopeParameters:
        """Raises `UnsupportedArchitecture` for a scaling or rotation that is not computed here,
        `CheckpointError` for parameters that are no numbers."""
        try:
            return cls._parse(config)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"config.json's rotary parameters are unusable: {error}."
            ) from error

    @classmethod
    def _parse(cls, config: Mapping[str, Any]) -> RopeParameters:
        given: dict[str, Any] = dict(config.get("rope_parameters") or {})
        if not given:
            given = dict(config.get("rope_scaling") or {})
        if any(isinstance(value, Mapping) for value in given.values()):
            raise UnsupportedArchitecture(
                "rotary parameters that differ by layer type are not supported."
            )
        scaling = given.get("rope_type", given.get("type")) or "default"
        if scaling == "su":  # LongRoPE's first name
            scaling = "longrope"
        if scaling not in SCALINGS:
            raise UnsupportedArchitecture(
                f"rotary scaling {scaling!r} is not one of {', '.join(SCALINGS)}."
            )
        partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise UnsupportedArchitecture("partial rotary embeddings are not supported.")
        theta = given.get("rope_theta") or config.get("rope_theta") or 10_000.0
        longest = int(config.get("max_position_embeddings", 2048))
        original = (
            config.get("original_max_position_embeddings")
            or given.get("original_max_position_embeddings")
            or longest
        )
        factor = given.get("factor")
        if factor is None:
            factor = longest / original if scaling in ("yarn", "longrope") else 1.0
        return cls(
            theta=float(theta),
            scaling=scaling,
            factor=float(factor),
            max_position=longest,
            original_max_position=int(original),
            low_freq_factor=float(given.get("low_freq_factor") or 1.0),
            high_freq_factor=float(given.get("high_freq_factor") or 4.0),
            beta_fast=float(given.get("beta_fast") or 32.0),
            beta_slow=float(given.get("beta_slow") or 1.0),
            truncate=bool(given.get("truncate", True)),
            short_factor=tuple(given.get("short_factor") or ()),
            long_factor=tuple(given.get("long_factor") or ()),
            attention_factor=_attention_factor(scaling, float(factor), int(original), given),
        )

    @property
    def context(self) -> int:
        """Positions the checkpoint is made for."""
        if self.scaling == "yarn":
            return max(self.max_position, round(self.factor * self.original_max_position))
        return self.max_position


def _attention_factor(
    scaling: str, factor: float, original: int, given: Mapping[str, Any]
) -> float:
    """Explicit, else YaRN's 0.1 ln(s) + 1 or LongRoPE's sqrt(1 + ln(s) / ln(original))."""
    explicit = given.get("attention_factor")
    if scaling not in ("yarn", "longrope"):
        return 1.0
    if explicit is not None:
        return float(explicit)
    if factor <= 1:
        return 1.0
    if scaling == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    mscale, mscale_all = given.get("mscale"), given.get("mscale_all_dim")
    if mscale and mscale_all:
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def inverse_frequencies(rope: RopeParameters, dim: int, length: int) -> Tensor:
    """Radians per position for each of dim / 2 pairs, fp32 [dim / 2].

    length: the longest sequence to be served; dynamic NTK and LongRoPE depend on it.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    if rope.scaling == "dynamic":
        # NTK-aware: the base grows so that the lowest frequency just spans the longer context.
        longest = max(length, rope.max_position)
        stretch = rope.factor * longest / rope.max_position - (rope.factor - 1)
        return 1.0 / (rope.theta * stretch ** (dim / (dim - 2))) ** exponents
    plain = 1.0 / rope.theta**exponents
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "yarn":
        return _yarn(rope, plain, dim)
    if rope.scaling == "llama3":
        return _llama3(rope, plain)
    if rope.scaling == "longrope":
        long = length > rope.original_max_position
        factors = torch.tensor(rope.long_factor if long else rope.short_factor)
        return 1.0 / (factors * rope.theta**exponents)
    return plain


def _yarn(rope: RopeParameters, plain: Tensor, dim: int) -> Tensor:
    """Peng et al. 2023: fast pairs as trained, slow pairs interpolated, a ramp between."""

    def pair_of(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _llama3(rope: RopeParameters, plain: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are interpolated, short ones kept, a smooth blend between."""
    turns = rope.original_max_position * plain / (2 * math.pi)  # over the original length
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain


def cos_sin_table(rope: RopeParameters, dim: int, length: int) -> Tensor:
    """[length, 2, dim / 2] fp32: cosines and sines, the attention factor multiplied in."""
    positions = torch.arange(length, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(rope, dim, length)
    return torch.stack([angles.cos(), angles.sin()], dim=1) * rope.attention_factor
