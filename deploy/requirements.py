"""Prints what an image installs, from `pyproject.toml`: one requirement a line.

    python deploy/requirements.py                 the run-time dependencies
    python deploy/requirements.py --extra gpu     with an optional group
    python deploy/requirements.py torch           only this one

So the image's dependency layers depend on `pyproject.toml` alone, and nothing is listed twice.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path


def requirements(project: dict, extras: list[str], name: str | None) -> list[str]:
    """Raises `SystemExit` when `name` or an extra is not in the project."""
    lines = list(project["dependencies"])
    for extra in extras:
        if extra not in project["optional-dependencies"]:
            raise SystemExit(f"pyproject.toml has no optional group {extra!r}")
        lines += project["optional-dependencies"][extra]
    if name is None:
        return lines
    lines = [line for line in lines if re.split(r"[^\w.-]", line)[0] == name]
    if not lines:
        raise SystemExit(f"pyproject.toml does not depend on {name!r}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--extra", action="append", default=[])
    args = parser.parse_args()
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    print(*requirements(tomllib.loads(text)["project"], args.extra, args.name), sep="\n")


if __name__ == "__main__":
    main()
