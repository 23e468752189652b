"""Runs the parts of a GPU benchmark, each in a process of its own: an illegal memory access or a
part that hangs takes nothing else along, and memory is given back in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu_device import Machine, record
from benchmarks.report import Row, rows_table

_ROW, _NOTE = "row: ", "note: "
LEAST = 20.0  # seconds that a part is worth beginning for


@dataclass(frozen=True, slots=True)
class Note:
    """A line for the reader: what was left out, and why."""

    text: str


def tell(found: Iterable[Row | Note]) -> int:
    """A part's process: writes each row as soon as there is one, so that none is lost."""
    for item in found:
        if isinstance(item, Note):
            print(_NOTE + item.text, flush=True)
        else:
            print(_ROW + json.dumps(asdict(item)), flush=True)
    return 0


def listen(output: str) -> tuple[list[Row], list[str]]:
    """The rows and notes in a part's output."""
    rows, notes = [], []
    for line in output.splitlines():
        if line.startswith(_ROW):
            rows.append(Row(**json.loads(line.removeprefix(_ROW))))
        elif line.startswith(_NOTE):
            notes.append(line.removeprefix(_NOTE))
    return rows, notes


def parts_parser(benchmark: str, description: str | None, parts: Iterable[str]) -> ArgumentParser:
    """The flags that all such benchmarks share."""
    made = ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
    )
    names = tuple(parts)
    add = made.add_argument
    add("--only", nargs="+", choices=names, help="these parts alone")
    add("--minutes", type=float, default=9.0, help="for all of it (9)")
    add("--json", type=Path, help="file for the full record")
    add("--dry-run", action="store_true", help="on a CPU, tiny: claims nothing about a GPU")
    add("--part", choices=names, help=SUPPRESS)  # what a child process does
    return made


def run_parts(
    benchmark: str,
    on: Machine,
    parts: Sequence[str],
    flags: Sequence[str],
    minutes: float,
    file: Path | None,
) -> tuple[list[Row], bool]:
    """Runs `python -m benchmarks.BENCHMARK --part PART FLAGS` for each, prints the table, writes
    the record to `file` and as the last line. Returns the rows, and whether all parts ended well
    and in time."""
    until = time.monotonic() + 60 * minutes
    rows: list[Row] = []
    notes: list[str] = []
    well = True
    for part in parts:
        left = until - time.monotonic()
        started = time.monotonic()
        if left < LEAST:
            notes.append(f"{part}: not run, the time was up")
            well = False
            continue
        command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--part", part, *flags]
        output, code = _run(command, left)
        found, said = listen(output)
        rows += found
        notes += said
        seconds = time.monotonic() - started
        print(f"{part}: {seconds:.0f} s, exit code {code}", file=sys.stderr, flush=True)
        if code != 0:
            tail = "\n".join(output.splitlines()[-25:])
            print(f"--- the end of {part}'s output\n{tail}\n---", file=sys.stderr, flush=True)
            why = "stopped, the time was up" if code is None else f"failed, exit code {code}"
            notes.append(f"{part}: {why}")
            well = False
        if file is not None:  # after each part: whatever happens later, this is there
            file.write_text(record(benchmark, on, rows, notes=notes) + "\n")
    if on.dry:
        notes.append("a dry run on a CPU with tiny models: nothing here is about a GPU")
    print(rows_table(rows))
    for note in notes:
        print(f"- {note}")
    print(record(benchmark, on, rows, notes=notes))
    return rows, well


def _run(command: Sequence[str], seconds: float) -> tuple[str, int | None]:
    """The output of a process and its exit code; None: it was stopped after so long."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        code: int | None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session: it and its children
                process.wait()
        output.seek(0)
        return output.read(), code
