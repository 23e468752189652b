"""Print the version."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata


def version() -> str:
    """The installed version; a checkout that was never installed says so."""
    try:
        return metadata.version("foresight")
    except metadata.PackageNotFoundError:
        return "0.0.0+checkout"


def run(arguments: Sequence[str]) -> int:
    print(f"foresight {version()}")
    return 0
