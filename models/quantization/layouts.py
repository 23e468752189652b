"""Which layout a checkpoint is in, and which one a format is written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kernels.linear.formats import Fp8Format, IntFormat, WeightFormat
from models.errors import CheckpointError
from models.quantization import compressed, six
from models.quantization.awq import Awq
from models.quantization.compressed import FloatQuantized, PackedIntegers
from models.quantization.fp8 import Fp8
from models.quantization.gptq import Gptq
from models.quantization.layout import Layout, WritableLayout, largest_group
from models.quantization.six import SixBits

# quant_method -> what reads its configuration
LAYOUTS: dict[str, Callable[[Mapping[str, Any]], Layout]] = {
    "awq": Awq.of,
    "gptq": Gptq.of,
    compressed.METHOD: compressed.layout_of,
    "fp8": Fp8.of,
    six.METHOD: SixBits.of,
}
READ = (
    "read are AWQ (4 bits, gemm), GPTQ (4 and 8 bits), compressed-tensors (pack-quantized, "
    "int-quantized and float-quantized, activations dynamic if quantized), fp8 (dynamic) and "
    "foresight's int6"
)


def stored_layout(config: Mapping[str, Any]) -> Layout | None:
    """Of the checkpoint with this config.json; None if its weights are dense.

    Raises `CheckpointError`, which says what is read.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise CheckpointError("config.json's quantization_config is not an object.")
    method = str(found.get("quant_method", "an unnamed method"))
    try:
        if method not in LAYOUTS:
            raise ValueError(f"weights quantized with {method}")
        return LAYOUTS[method](found)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"config.json's {method} quantization is damaged: {error}."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{error} are not read; {READ}.") from error


def format_for(name: str, inputs: Sequence[int]) -> WeightFormat:
    """The format that the option `quantization` calls so, for layers of so many inputs.

    All layers get groups of one size, as other engines want it. Raises `CheckpointError`.
    """
    try:
        if name == "fp8":
            return Fp8Format(None)
        if name == "int8":
            return IntFormat(8, None)
        if name in ("int6", "int4"):
            return IntFormat(int(name[-1]), largest_group(inputs))
    except ValueError as error:
        raise CheckpointError(f"this model cannot be quantized to {name}: {error}.") from error
    raise CheckpointError(f"quantization {name!r} is not one of int8, int6, int4, fp8.")


def layout_for(form: WeightFormat) -> WritableLayout:
    """What checkpoints of one of `format_for`'s formats are written in."""
    if isinstance(form, Fp8Format):
        return FloatQuantized()
    assert isinstance(form, IntFormat)
    if form.bits == 6:
        assert form.group is not None
        return SixBits(form.group)
    return PackedIntegers(form.bits, form.group)
