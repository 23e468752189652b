"""The documentation says nothing the code does not: tables, links, options, commands, metrics."""

from __future__ import annotations

import re
import subprocess
from itertools import chain
from pathlib import Path

import pytest

from benchmarks import (
    gpu_bench,
    gpu_check,
    kv_demotion,
    kv_demotion_load,
    kv_formats,
    kv_ties,
    kv_windows,
    scheduling,
    scheduling_server,
    serving,
    speculation,
)
from cli import calibrate, document, plan, quantize, simulate
from cli import profile as profiling
from cli.options import options
from docs import tables
from loadtest import __main__ as loadtest
from server.app import create_app
from tests.deploy.test_deploy import exported, metric_names
from tests.server.helpers import config, reply_engine, text_assets

root = Path(__file__).parent.parent
pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
names = [str(page.relative_to(root)) for page in pages]
each_page = pytest.mark.parametrize("page", pages, ids=names)


def code(text: str, language: str) -> str:
    """All fenced blocks of one language."""
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("page", tables.pages)
def test_generated_tables_are_fresh(page: str) -> None:
    text = (root / "docs" / page).read_text()
    assert tables.filled(text) == text, "run python -m docs.tables"
    assert "<!-- table: " in text


def test_configuration_page_is_fresh() -> None:
    assert document.PAGE.read_text() == document.page(), "run make docs"


def test_every_endpoint_is_documented() -> None:
    paths = create_app(reply_engine(), text_assets(), config()).openapi()["paths"]
    text = (root / "docs" / "api.md").read_text()
    for path, methods in paths.items():
        for method in methods:
            if method != "head":
                assert f"`{method.upper()} {path}`" in text, f"{method} {path}"


def test_every_error_code_is_documented() -> None:
    text = (root / "docs" / "api.md").read_text()
    sources = (path.read_text() for path in (root / "server").glob("*.py"))
    codes = set(chain.from_iterable(re.findall(r'code="([a-z_]+)"', s) for s in sources))
    assert len(codes) > 8
    assert [code for code in sorted(codes) if f"`{code}`" not in text] == []


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"no heading for {target}"


@each_page
def test_options_exist(page: Path) -> None:
    ours = {flag for option in options() for flag in (*option.flags, *option.off_flags)}
    ours |= {flag.replace("--", "--no-", 1) for flag in ours} | {"--config", "--help"}
    for made in (
        serving.parser(),
        loadtest.parser(),
        profiling.parser(),
        calibrate.parser(),
        quantize.parser(),
        simulate.parser(),
        plan.parser(),
        scheduling.parser(),
        scheduling_server.parser(),
        speculation.parser(),
        kv_formats.parser(),
        kv_demotion.parser(),
        kv_demotion_load.parser(),
        kv_ties.parser(),
        kv_windows.parser(),
        gpu_check.parser(),
        gpu_bench.parser(),
    ):
        ours |= set(chain.from_iterable(action.option_strings for action in made._actions))
    for maker in (root / "makers").glob("*.py"):
        ours |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', maker.read_text()))
    # Other programs' options stand in fenced commands and inline code of their own.
    foreign = {"--target", "--gpus", "--rm", "--build", "--headless"}
    foreign |= {"--storage", "--web", "--disable-pip-version-check", "--no-start"}
    foreign |= {"--continuous-batching", "--format", "--plot"}
    text = re.sub(r"\bvllm serve.*?(?=```|\n\n)", "", page.read_text(), flags=re.DOTALL)
    asked = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?!-…)\b(?!-…)", text))
    assert asked <= ours | foreign, sorted(asked - ours - foreign)


@each_page
def test_metrics_exist(page: Path) -> None:
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported()}
    assert metric_names(page.read_text()) <= exported() | families


@each_page
def test_make_targets_exist(page: Path) -> None:
    makefile = (root / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    inline = re.findall(r"`([^`\n]+)`", page.read_text())
    commands = "\n".join([code(page.read_text(), "sh"), *inline])
    assert set(re.findall(r"\bmake ([a-z-]+)\b", commands)) <= targets


@each_page
def test_modules_that_commands_run_exist(page: Path) -> None:
    for module in re.findall(r"python3? -m ([a-z_.]+)", page.read_text()):
        if module not in ("venv", "pip"):
            path = root / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@each_page
def test_nothing_of_one_machine(page: Path) -> None:
    assert not re.findall(r"(?<![\w.])/(?:work|root|home/(?!foresight))\b", page.read_text())


@each_page
def test_python_examples_compile(page: Path) -> None:
    compile(code(page.read_text(), "python"), page.name, "exec")


def test_ci_runs_what_the_readme_says() -> None:
    script = (root / ".ci" / "run").read_text()
    assert "make test" in code((root / "README.md").read_text(), "sh")
    assert "make test" in script
    subprocess.run(["bash", "-n", root / ".ci" / "run"], check=True)


def test_every_page_is_reachable_from_the_readme() -> None:
    seen, todo = set(), [root / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)[^)]*\)", page.read_text())
        todo += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert {page.resolve() for page in pages} <= seen
