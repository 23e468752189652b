"""A report of one load test: tables and plots, as Markdown and as one HTML page.

    python -m loadtest.report loadtest/reports/mixed

reads `mixed_samples.jsonl` and locust's `mixed_*.csv` and writes `mixed.md`, `mixed.html` and
`mixed_*.svg` beside them. `python -m loadtest` does this at the end of every run.
"""

from __future__ import annotations

import argparse
import html
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import commit, machine, table
from loadtest import plots
from loadtest.results import Answer, Results, duration, read, summarise
from loadtest.scenario import Scenario, load_all

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def kinds(answers: Sequence[Answer]) -> list[str]:
    return sorted({answer.kind for answer in answers})


def latency_table(answers: Sequence[Answer], scenario: Scenario) -> Table:
    """One line per kind of request, and one for all."""
    header: tuple[str, ...] = ("requests", "count", "errors", "output tokens", "within targets")
    for what in ("TTFT", "inter-token", "whole answer"):
        header += tuple(f"{what} {p} ms" for p in ("p50", "p90", "p99"))
    groups = [(kind, [a for a in answers if a.kind == kind]) for kind in kinds(answers)]
    lines = []
    for name, group in [*groups, ("all", list(answers))]:
        s = summarise(name, group, scenario.slo)
        share = f"{s.good / s.requests:.0%}" if s.requests else "-"
        times = (f"{t:.1f}" for t in (*s.ttft_ms, *s.gap_ms, *s.total_ms))
        counts = (str(s.requests), str(s.errors), str(s.output_tokens), share)
        lines.append((s.name, *counts, *times))
    return header, lines


def facts(results: Results, scenario: Scenario) -> list[str]:
    """The sentences above the tables."""
    answers = results.answers
    seconds = duration(answers)
    whole = summarise("all", answers, scenario.slo)
    users = max((second.users for second in results.history), default=0)
    rate = whole.output_tokens / seconds if seconds else 0.0
    goodput = whole.good / seconds if seconds else 0.0
    slo = scenario.slo
    return [
        f"Scenario {scenario.name}: {' '.join(scenario.about.split())}",
        f"{whole.requests} requests by up to {users} users in {seconds:.1f} s, "
        f"{whole.errors} failed; {rate:.0f} output tokens a second.",
        f"Goodput {goodput:.2f} requests a second: first token within {slo.ttft_ms:g} ms and the "
        f"request's median inter-token time within {slo.inter_token_ms:g} ms.",
        f"Measured by the client on {machine()}, commit {commit()}. The client shares the machine "
        "with the server when both run on loopback.",
    ]


def failures_table(results: Results) -> Table:
    return ("count", "failure"), [(str(count), what) for count, what in results.failures]


def to_markdown(
    title: str, sentences: Sequence[str], tables: Sequence[Table], images: Sequence[Path]
) -> str:
    parts = [f"# {title}", *sentences]
    parts += [table(header, lines) for header, lines in tables if lines]
    parts += [f"![{image.stem}]({image.name})" for image in images]
    return "\n\n".join(parts) + "\n"


def to_html(
    title: str, sentences: Sequence[str], tables: Sequence[Table], images: Sequence[Path]
) -> str:
    """One page with the plots inside, so that it can be passed on as a single file."""
    out = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(title)}</title>",
        "<style>body{font:15px system-ui;max-width:72rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1rem 0}"
        "td,th{border:1px solid #ccc;padding:.25rem .5rem;text-align:right}"
        "td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}</style>",
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(sentence)}</p>" for sentence in sentences),
    ]
    for header, lines in tables:
        if not lines:
            continue
        out.append("<table><tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in header) + "</tr>")
        out += [
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
            for line in lines
        ]
        out.append("</table>")
    for image in images:
        svg = image.read_text()
        out.append(svg[svg.index("<svg") :])
    return "\n".join(out) + "\n"


def write(prefix: Path, scenario: Scenario) -> tuple[Path, Path]:
    """Writes the report of the run that left `PREFIX_…`; returns the Markdown and HTML files."""
    results = read(prefix)
    title = f"Load test: {scenario.name}"
    sentences = facts(results, scenario)
    tables = [latency_table(results.answers, scenario), failures_table(results)]
    images = plots.draw(results, scenario, prefix)
    markdown, page = Path(f"{prefix}.md"), Path(f"{prefix}.html")
    markdown.write_text(to_markdown(title, sentences, tables, images))
    page.write_text(to_html(title, sentences, tables, images))
    return markdown, page


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prefix", type=Path, help="what `--csv` and the samples start with")
    parser.add_argument("--scenario", help="default: the prefix's last part")
    args = parser.parse_args(argv)
    scenarios = load_all()
    name = args.scenario or args.prefix.name
    if name not in scenarios:
        parser.error(f"no scenario {name!r}; there are {', '.join(scenarios)}")
    for path in write(args.prefix, scenarios[name]):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
