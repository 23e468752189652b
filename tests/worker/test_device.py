"""How much memory there is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from worker import device


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.left_in_container(tmp_path) == math.inf  # no control groups
    stat = "anon 700\ninactive_file 200\n"
    group(tmp_path, memory__max="max\n", memory__current="900\n", memory__stat=stat)
    assert device.left_in_container(tmp_path) == math.inf
    group(tmp_path, memory__max="1500\n")
    assert device.left_in_container(tmp_path) == 800
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    assert device.available_host_memory() == 800
    group(tmp_path, memory__max="600\n")
    assert device.available_host_memory() == 0


def test_a_containers_limit_of_the_first_version_counts(tmp_path: Path) -> None:
    group(
        tmp_path / "memory",
        memory__limit_in_bytes="5000\n",
        memory__usage_in_bytes="3000\n",
        memory__stat="total_inactive_file 1000\n",
    )
    assert device.left_in_container(tmp_path) == 3000
