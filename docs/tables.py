"""Fills the generated tables of the documentation from the code they describe.

    python -m docs.tables

In a page, everything between `<!-- table: NAME -->` and `<!-- end -->` is generated. A test holds
the pages to their sources.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import Metric

from engine.messages import EngineFacts
from scheduler.request import Load
from server.metrics import Metrics
from server.parameters import PARAMETERS, Endpoint, Handling, Parameter

folder = Path(__file__).parent


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    cells = [list(header), *(list(line) for line in lines)]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(
        f"| {' | '.join(c.replace('|', chr(92) + '|') for c in row)} |" for row in cells
    )


def fields(handling: Handling) -> str:
    """Request fields that are handled alike."""

    def line(parameter: Parameter) -> list[str]:
        places = {Endpoint.CHAT: "chat", Endpoint.COMPLETIONS: "completions"}
        where = ", ".join(name for end, name in places.items() if end in parameter.endpoints)
        passes = ", ".join(f"`{value!r}`" for value in parameter.neutral)
        last = [] if handling is Handling.HONOURED else [passes]
        return [f"`{parameter.name}`", where, parameter.note, *last]

    header = ["field", "endpoints", "meaning"]
    if handling is not Handling.HONOURED:
        header += ["passes as"]
    return markdown(header, [line(p) for p in PARAMETERS if p.handling is handling])


def metrics() -> str:
    """What `/metrics` exports."""

    def labels(family: Metric) -> str:
        own = {name for sample in family.samples for name in sample.labels}
        return ", ".join(sorted(own - {"model_name", "engine", "le"}))

    def name(family: Metric) -> str:
        return f"`{family.name}{'_total' if family.type == 'counter' else ''}`"

    facts = EngineFacts(
        max_model_len=1,
        vocab_size=1,
        num_pages=1,
        page_size=1,
        max_num_seqs=1,
        max_logprobs=1,
        device="cpu",
        dtype="bfloat16",
    )
    exported = Metrics("demo", lambda: Load(accepted_by_position=(0,)), lambda: facts)
    for _, counter in exported.counters():
        if counter.label is not None:
            counter.add(label="x")
    return markdown(
        ("metric", "type", "labels", "meaning"),
        [(name(f), f.type, labels(f), f.documentation) for f in exported.registry.collect()],
    )


tables = {
    "honoured": lambda: fields(Handling.HONOURED),
    "ignored": lambda: fields(Handling.IGNORED),
    "refused": lambda: fields(Handling.REFUSED),
    "metrics": metrics,
}
pages = ("api.md", "operations.md")


def filled(text: str) -> str:
    """The page with its tables as they should be. Raises `KeyError` for an unknown table."""
    return re.sub(
        r"<!-- table: (\w+) -->\n.*?<!-- end -->",
        lambda match: f"<!-- table: {match[1]} -->\n{tables[match[1]]()}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for page in pages:
        path = folder / page
        path.write_text(filled(path.read_text()))
