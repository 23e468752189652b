"""Fit a KV format to a model by your own prompts.

    foresight calibrate --model FOLDER --prompts FILE --kv-format int4h --output kv.json

reads the prompts with dense pages and with pages of every format, and says how far the words that
the model would choose move, and how wrong attention's logits become in each layer. Channels of keys
and values that stand out are made like the others first, by powers of two that go into the weights
and change nothing else. For the format asked for it takes the mean of each layer's keys, which is
subtracted before they are stored, and gives eight bits to as many layers as the limit needs, those
first whose own error is largest. For fp8 it finds the largest number of each head, too, and a
scale that brings twice that into the format's range. The result is a file for `foresight serve
--kv-calibration`. A format that stays above the limit with a third of the layers in eight bits is
refused.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track
from rich.table import Table

from cli.config import resolve
from cli.errors import CommandError
from cli.output import write_output

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.kv.calibration import Calibration
    from kernels.kv.format import KVFormat
    from worker.kv_logits import LogitError
    from worker.kv_quality import Distance, Reader

Points = Mapping[str, tuple[float, float]]  # by format: bytes of a token, divergence in nats

MOST_WIDE = 3  # of so many layers one may get eight bits
COLUMNS = 6  # formats beside each other in a table


def run(arguments: Sequence[str]) -> int:
    """Measures, prints, chooses and writes the file."""
    given, rest = parser().parse_known_args(arguments)
    config = resolve(rest, os.environ).engine
    name = config.cache.kv_format
    if name == "auto":
        raise CommandError("say which format to fit, for example --kv-format int4h.")
    if config.cache.kv_boundary_layers is not None or config.cache.kv_calibration is not None:
        raise CommandError("boundary layers and a calibration are what is to be found out.")
    if given.length < 2 or not given.limit > 0:
        raise CommandError("--length must be at least 2, --limit a number above 0.")
    logging.getLogger("engine").setLevel(logging.WARNING)
    console = Console(highlight=False)
    draw = None if given.plot is None else plotter(Path(given.plot))
    from engine.calibrating import build_reader
    from engine.errors import StartupError

    try:
        reader, tokenize, chosen = build_reader(config)
        texts = pieces(prompts_of(Path(given.prompts)), tokenize, given.length, given.tokens)
    except (StartupError, ValueError) as error:
        raise CommandError(str(error)) from error
    console.print(f"{sum(map(len, texts)):,} tokens in {len(texts)} pieces, {chosen}")
    trial = Trial(reader, texts, console)
    points = trial.compare()
    if draw is not None:
        draw(points)
    trial.by_layer()
    calibration = trial.fit(name, given.limit)
    write_output(given.output, calibration.dump(), console)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's own flags; all others are those of `foresight serve`."""
    made = argparse.ArgumentParser(
        prog="foresight calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All options of foresight serve are taken too.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--prompts", metavar="FILE", required=True, help="text, or JSON lines with a `prompt`")
    add("--output", metavar="FILE", required=True, help="where the calibration goes")
    add(
        "--limit",
        type=float,
        default=0.05,
        help="nats that the next token's distribution may move, on average (%(default)s)",
    )
    add("--plot", metavar="FILE", help="draw quality against bytes of a token here, as SVG")
    add("--tokens", type=int, default=8192, help="of prompts to read, at most (%(default)s)")
    add("--length", type=int, default=2048, help="of a piece of text, in tokens (%(default)s)")
    return made


def prompts_of(file: Path) -> list[str]:
    """Raises ValueError."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompts {file} cannot be read: {error}.") from error
    if file.suffix != ".jsonl":
        return [text]
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found.append(str(json.loads(line)["prompt"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f'{file}, line {number}: not an object with a "prompt".') from None
    return found


def pieces(
    texts: Sequence[str], tokenize: Callable[[str], Sequence[int]], length: int, most: int
) -> list[list[int]]:
    """At most `most` tokens in pieces of `length` and less. Raises ValueError for hardly any."""
    found: list[list[int]] = []
    for text in texts:
        tokens = tokenize(text)
        for start in range(0, len(tokens), length):
            room = most - sum(map(len, found))
            piece = list(tokens[start : start + min(length, room)])
            if len(piece) > 1:
                found.append(piece)
    if sum(map(len, found)) < 256:
        raise ValueError("the prompts have fewer than 256 tokens, too few to learn anything from.")
    return found


def plotter(file: Path) -> Callable[[Points], None]:
    """Draws to the file; asked for first, so that nothing is missed after all the work."""
    try:
        from cli.plots import draw_formats
    except ImportError as error:
        raise CommandError("--plot needs matplotlib: pip install matplotlib.") from error

    def draw(points: Points) -> None:
        try:
            draw_formats(points, file)
        except OSError as error:
            raise CommandError(f"the plot cannot be written: {error}") from error

    return draw


class Trial:
    """Dense pages and others on the same texts."""

    def __init__(self, reader: Reader, texts: Sequence[Sequence[int]], console: Console) -> None:
        from worker.kv_moments import balance, head_scales, key_means

        self._reader, self._texts, self._console = reader, texts, console
        spec = reader.model.spec
        self._shape = (spec.num_layers, spec.num_kv_heads, spec.head_dim)
        self._balance = balance(reader, texts)
        if self._balance.changes:
            count = f"{self._balance.changes:,} channels of keys and values"
            console.print(f"{count} are made alike, here and where the calibration is used")
        self._dense = [self._read(tokens, "auto") for tokens in texts]
        self._means = key_means(reader, texts)
        self._scales = head_scales(reader, texts, self._means)
        self._errors: dict[str, list[LogitError]] = {}

    def compare(self) -> Points:
        """Prints what every format does with the layers that it asks for."""
        from kernels.kv.format import page_bytes
        from kernels.kv.presets import NAMES
        from worker.kv_quality import PAGE

        table = Table("format", "bytes a token", "loss", "KL, nats", "same first choice")
        _, heads, dim = self._shape
        refused: list[str] = []
        points = {}
        for name in track(NAMES, "formats", console=self._console, transient=True):
            try:
                found = self.distance(name)
            except ValueError as error:  # of the head, or of the kernels
                refused.append(f"{name} is left out: {error}")
                continue
            forms = self._formats(name)
            size = sum(page_bytes(f, heads, PAGE, dim, self._reader.dtype) for f in forms) / PAGE
            table.add_row(name, f"{size:,.0f}", *found.cells())
            points[name] = (size, found.divergence / found.tokens)
        self._console.print(table)
        for line in refused:
            self._console.print(line, soft_wrap=True)
        self._errors = self._logit_errors(list(points))
        return points

    def by_layer(self) -> None:
        """Prints the error of attention's logits in each layer, were it in each format."""
        names = list(self._errors)
        self._console.print("error of attention's logits by layer, weighted by attention, nats:")
        for start in range(0, len(names), COLUMNS):
            some = names[start : start + COLUMNS]
            table = Table("layer", *some)
            for layer in range(self._shape[0]):
                cells = (f"{self._errors[name][layer].rms:.2g}" for name in some)
                table.add_row(str(layer), *cells)
            self._console.print(table)

    def _logit_errors(self, names: Sequence[str]) -> dict[str, list[LogitError]]:
        from worker.kv_logits import logit_errors

        formats = {name: self._formats(name, ()) for name in names}
        return logit_errors(self._reader, self._texts, formats)

    def fit(self, name: str, limit: float) -> Calibration:
        """Raises `CommandError` if the limit is not met."""
        if name not in self._errors:
            raise CommandError(f"{name} does not suit this model.")  # it is printed why
        layers = self._shape[0]
        alone = []
        self._console.print(f"{name} in one layer alone:")
        attention = ("logit error", "KL of attention", "same first key")
        table = Table("layer", *attention, "KL, nats", "same first choice")
        for layer in track(range(layers), "layers", console=self._console, transient=True):
            wide = set(range(layers)) - {layer}
            found = self.distance(name, wide)
            alone.append(found.divergence / found.tokens)
            table.add_row(str(layer), *self._errors[name][layer].cells(), *found.cells()[1:])
        self._console.print(table)
        order = sorted(range(layers), key=lambda layer: -alone[layer])
        for count in range(layers // MOST_WIDE + 1):
            wide = set(order[:count])
            found = self.distance(name, wide)
            moved = found.divergence / found.tokens
            self._console.print(f"{count} layers in eight bits: {moved:.3g} nats")
            if moved <= limit:
                return self._calibration(name, sorted(wide))
        raise CommandError(
            f"{name} moves the next token's distribution by {moved:.3g} nats with {count} layers "
            f"in eight bits, more than the limit of {limit:g}: take a format of more bits."
        )

    def distance(self, name: str, wide: Collection[int] | None = None) -> Distance:
        """`wide`: the layers in eight bits, with what was found; None: as without a calibration."""
        import torch

        from worker.kv_quality import Distance

        found = Distance()
        for tokens, dense in zip(self._texts, self._dense, strict=True):
            other = self._read(tokens, name, wide)
            following = torch.tensor(tokens[1:], device=dense.device)
            found.add(other[:-1], dense[:-1], following)
        return found

    def _read(
        self, tokens: Sequence[int], name: str, wide: Collection[int] | None = None
    ) -> Tensor:
        return self._reader.log_probabilities(tokens, self._formats(name, wide))

    def _formats(self, name: str, wide: Collection[int] | None = None) -> list[KVFormat]:
        from kernels.kv.presets import layer_formats
        from worker.kv_quality import PAGE

        layers, heads, dim = self._shape
        fitted = None if wide is None else self._calibration(name, wide)
        return layer_formats(name, layers, heads, PAGE, dim, None, fitted)

    def _calibration(self, name: str, wide: Collection[int]) -> Calibration:
        from kernels.kv.calibration import Calibration
        from kernels.kv.presets import SCALED

        scales = self._scales if name in SCALED else None
        return Calibration(name, tuple(wide), self._means, self._balance, scales)
