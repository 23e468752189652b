"""Who may import whom: the contracts stand in pyproject.toml under [tool.importlinter]."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from importlinter import cli

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("cli", "engine", "kernels", "models", "scheduler", "server", "text", "worker")


def test_import_contracts_hold(monkeypatch):
    monkeypatch.chdir(PROJECT)
    monkeypatch.syspath_prepend(str(PROJECT))
    assert cli.lint_imports(cache_dir=None) == cli.EXIT_STATUS_SUCCESS


def test_the_api_process_never_loads_torch():
    script = (
        "import cli.api, engine.client, engine.supervisor, server.app, sys; "
        "print([name for name in ('torch', 'worker', 'models', 'kernels', 'transformers') "
        "if name in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_only_cli_reads_the_environment():
    """`os.environ` and `os.getenv` anywhere else would be configuration from a second place."""
    offenders = []
    for package in PACKAGES:
        if package == "cli":
            continue
        for file in sorted((PROJECT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                    offenders.append(f"{file.relative_to(PROJECT)}:{node.lineno}")
    assert offenders == []


def test_every_package_is_installed():
    """The packages are listed by hand; one left out would be missing from the image only."""
    text = (PROJECT / "pyproject.toml").read_text()
    folders = {
        ".".join(file.parent.relative_to(PROJECT).parts)
        for package in PACKAGES
        for file in (PROJECT / package).rglob("__init__.py")
    }
    assert [folder for folder in sorted(folders) if f'"{folder}"' not in text] == []
