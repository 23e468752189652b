"""Write a checkpoint in few bits, and measure what that costs.

    foresight quantize MODEL OUT --format int4

rounds the weights of MODEL, a folder or hub id, to the nearest codes and writes them to the folder
OUT, with the tokenizer and configuration beside them. int4, int8 and fp8 are in the format of
compressed-tensors, which vLLM and the transformers library read too; int6 is our own.

Then both are read on the same text, and it says how the loss changes, how far the next token's
distribution moves (KL) and how often the first choice stays. The text is your --prompts, or some
that ships with Python and that the bundled models were not trained on.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from cli.calibrate import pieces, prompts_of
from cli.config import resolve
from cli.errors import CommandError

if TYPE_CHECKING:
    from torch import Tensor

    from engine.config import EngineConfig
    from worker.kv_quality import Reader

FORMATS = ("int4", "int6", "int8", "fp8")
TOPICS = ("context-managers", "dynamic-features", "formatstrings", "slicings", "while")
MODULES = ("textwrap", "sched", "fnmatch", "colorsys")


def run(arguments: Sequence[str]) -> int:
    """Writes, measures and prints."""
    given, rest = parser().parse_known_args(arguments)
    config = resolve(["--model", given.model, *rest], os.environ).engine
    if config.model.quantization != "none":
        raise CommandError("say --format instead of --quantization here.")
    if config.model.load_format != "safetensors":
        raise CommandError("there are no weights to write with --load-format dummy.")
    if given.length < 2 or given.tokens < 2:
        raise CommandError("--length and --tokens must be at least 2.")
    logging.getLogger("engine").setLevel(logging.WARNING)
    console = Console(highlight=False)
    from models.errors import CheckpointError
    from models.quantization.save import quantize_checkpoint
    from models.weights import resolve_checkpoint

    output = Path(given.output)
    try:
        texts = [] if given.no_measure else texts_of(given.prompts)
        with console.status("reading the checkpoint") as status:
            written = quantize_checkpoint(
                resolve_checkpoint(config.model.model, config.model.revision),
                output,
                given.format,
                progress=lambda name: status.update(f"rounding {name}"),
            )
    except (CheckpointError, ValueError) as error:
        raise CommandError(str(error)) from error
    console.print(f"{written.form} written to {output}", soft_wrap=True)
    console.print(
        f"{written.before / 1e6:,.1f} MB of tensors are {written.after / 1e6:,.1f} MB, "
        f"{written.after / written.before:.1%}"
    )
    if not given.no_measure:
        measure(config, output, texts, given.length, given.tokens, console)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's own flags; all others are those of `foresight serve`."""
    made = argparse.ArgumentParser(
        prog="foresight quantize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All options of foresight serve are taken too.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("model", metavar="MODEL", help="a dense checkpoint's folder, or a hub id")
    add("output", metavar="OUT", help="a folder that is not there yet")
    add("--format", choices=FORMATS, required=True, help="of the weights")
    add("--prompts", metavar="FILE", help="text, or JSON lines with a `prompt`, to measure on")
    add("--tokens", type=int, default=4096, help="of text to read, at most (%(default)s)")
    add("--length", type=int, default=1024, help="of a piece of text, in tokens (%(default)s)")
    add("--no-measure", action="store_true", help="write only")
    return made


def texts_of(prompts: str | None) -> list[str]:
    """Raises ValueError."""
    if prompts is not None:
        return prompts_of(Path(prompts))
    sources = [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    return [*(topics[name] for name in TOPICS if name in topics), *sources]


def measure(
    config: EngineConfig,
    output: Path,
    texts: Sequence[str],
    length: int,
    most: int,
    console: Console,
) -> None:
    """Reads the texts with both checkpoints, one after the other, and prints the distance."""
    import torch

    from engine.calibrating import build_reader
    from engine.errors import StartupError
    from worker.kv_quality import Distance

    small = replace(config, model=replace(config.model, model=str(output), revision=None))
    found = Distance()
    try:
        reader, tokenize, chosen = build_reader(config)
        tokens = pieces(texts, tokenize, length, most)
        console.print(f"{sum(map(len, tokens)):,} tokens in {len(tokens)} pieces, {chosen}")
        dense = read(reader, tokens)
        del reader  # its memory is the other's
        reader, _, _ = build_reader(small)
        for piece, before, after in zip(tokens, dense, read(reader, tokens), strict=True):
            following = torch.tensor(piece[1:], device=before.device)
            found.add(after[:-1], before[:-1], following)
    except (StartupError, ValueError) as error:
        raise CommandError(str(error)) from error
    table = Table("loss, nats", "before", "change", "KL, nats", "same first choice")
    losses = (found.loss / found.tokens, found.dense_loss / found.tokens)
    table.add_row(*(f"{loss:.4f}" for loss in losses), *found.cells())
    console.print(table)


def read(reader: Reader, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """[tokens, vocab] log-probabilities of each text, with dense KV pages."""
    from kernels.kv.format import DENSE

    pages = [DENSE] * reader.model.spec.num_layers
    return [reader.log_probabilities(tokens, pages) for tokens in texts]
