"""`Calibration`: what `foresight calibrate` found out about one model's keys and values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.kv.balance import LARGEST, Balance
from kernels.kv.scales import MOST, HeadScales

VERSION = 3


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """For one format and one model."""

    kv_format: str
    eight_bit_layers: tuple[int, ...]  # that the format is too coarse for
    key_means: Tensor  # [layers, kv_heads, head_dim] fp32, of balanced keys
    balance: Balance
    scales: HeadScales | None = None  # of balanced keys, less their means, for formats that ask

    def dump(self) -> str:
        means = [[[float(f"{x:.6g}") for x in head] for head in layer] for layer in self._lists()]
        scales = self.scales
        data = {
            "version": VERSION,
            "kv_format": self.kv_format,
            "eight_bit_layers": list(self.eight_bit_layers),
            "key_means": means,
            "key_exponents": self.balance.keys.tolist(),
            "value_exponents": self.balance.values.tolist(),
            "key_scale_exponents": None if scales is None else scales.keys.tolist(),
            "value_scale_exponents": None if scales is None else scales.values.tolist(),
        }
        return json.dumps(data)

    def _lists(self) -> list[list[list[float]]]:
        lists: list[list[list[float]]] = self.key_means.tolist()
        return lists

    @classmethod
    def parse(cls, text: str) -> Calibration:
        """The inverse of `dump`. Raises ValueError, in a sentence."""
        try:
            data = json.loads(text)
            if data["version"] != VERSION:
                raise ValueError(f"the calibration is of version {data['version']}, not {VERSION}")
            means = torch.tensor(data["key_means"], dtype=torch.float32)
            layers = tuple(int(layer) for layer in data["eight_bit_layers"])
            balance = Balance(
                torch.tensor(data["key_exponents"], dtype=torch.int64),
                torch.tensor(data["value_exponents"], dtype=torch.int64),
            )
            scales = _scales(data["key_scale_exponents"], data["value_scale_exponents"])
            found = cls(str(data["kv_format"]), layers, means, balance, scales)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no calibration: {error}") from error
        if means.dim() != 3 or not means.isfinite().all():
            raise ValueError("the calibration's key means are not [layers, kv_heads, head_dim]")
        for exponents in (balance.keys, balance.values):
            if exponents.shape != means.shape or int(exponents.abs().max()) > LARGEST:
                raise ValueError(
                    f"the calibration's exponents are not [layers, kv_heads, head_dim], "
                    f"-{LARGEST} to {LARGEST}"
                )
        for exponents in () if scales is None else (scales.keys, scales.values):
            if exponents.shape != means.shape[:2] or int(exponents.abs().max()) > MOST:
                raise ValueError(
                    f"the calibration's exponents of scales are not [layers, kv_heads], "
                    f"-{MOST} to {MOST}"
                )
        return found

    def part(self, index: int, pieces: int) -> Calibration:
        """Piece `index` of `pieces` of the KV heads."""
        heads = self.key_means.chunk(pieces, 1)[index]
        balance = self.balance.part(index, pieces)
        scales = None if self.scales is None else self.scales.part(index, pieces)
        return Calibration(self.kv_format, self.eight_bit_layers, heads, balance, scales)

    def check(self, kv_format: str, shape: Sequence[int]) -> None:
        """Raises ValueError unless it is for this format and layers, KV heads and head size."""
        if self.kv_format != kv_format:
            raise ValueError(f"the calibration is for {self.kv_format}, not {kv_format}")
        if tuple(self.key_means.shape) != tuple(shape):
            raise ValueError(
                f"the calibration is for layers, KV heads and head size "
                f"{tuple(self.key_means.shape)}, the model has {tuple(shape)}"
            )
        if not set(self.eight_bit_layers) <= set(range(shape[0])):
            raise ValueError("the calibration names layers that the model has not")


def _scales(keys: object, values: object) -> HeadScales | None:
    """Of a file; None if it says of neither."""
    if keys is None and values is None:
        return None
    return HeadScales(
        torch.tensor(keys, dtype=torch.int64), torch.tensor(values, dtype=torch.int64)
    )
