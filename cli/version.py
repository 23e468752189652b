"""Print the version."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib import metadata

from cli.config import PROJECT


def version() -> str:
    """The installed version, or that of the checkout this runs from."""
    try:
        return metadata.version("foresight")
    except metadata.PackageNotFoundError:
        project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
        found: str = project["version"]
        return found


def run(arguments: Sequence[str]) -> int:
    print(f"foresight {version()}")
    return 0
