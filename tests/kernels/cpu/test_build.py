"""Building, caching and loading the native kernels, and what happens where that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.cpu import build as building
from kernels.cpu.build import BuildError, build, find_toolchain, load, openmp_runtimes, start_build
from kernels.cpu.ops import NativeOps


def test_one_openmp_runtime_is_mapped(native: NativeOps) -> None:
    assert native.name == "native-cpu"
    runtimes = openmp_runtimes()
    assert len(runtimes) == 1
    assert "torch" in runtimes[0]


def test_a_build_is_found_again(native_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Path:
        raise AssertionError("compiled again")

    monkeypatch.setattr(building, "_compile", fail)
    assert build(native_library.parent) == native_library
    assert [p.name for p in native_library.parent.iterdir()] == [native_library.name]


def test_start_build_delivers_kernels(native_library: Path) -> None:
    assert start_build(native_library.parent).result(timeout=60).name == "native-cpu"


def test_without_a_compiler_the_reason_is_given(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no C\+\+ compiler"):
        find_toolchain(("no-such-compiler",))


def test_a_failing_compiler_leaves_nothing_behind(
    tmp_path: Path, native_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "broken++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit\n'
        'echo "x.cpp:1: error: cannot do it" >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    with pytest.raises(BuildError, match=r"broken\+\+ failed: x\.cpp:1: error: cannot do it"):
        build(cache, find_toolchain((str(compiler),)))
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(building, "find_toolchain", lambda: find_toolchain((str(compiler),)))
    with pytest.raises(BuildError, match="cannot do it"):
        start_build(cache).result(timeout=60)


def test_another_compiler_is_another_key(tmp_path: Path, native_library: Path) -> None:
    compiler = tmp_path / "other++"
    compiler.write_text("#!/bin/sh\necho other 2.0\n")
    compiler.chmod(0o755)
    assert find_toolchain((str(compiler),)).key() not in native_library.name


def test_an_unwritable_folder_is_a_build_error(tmp_path: Path, native_library: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="cannot write"):
        build(tmp_path / "file" / "cache")


def test_a_broken_library_is_a_build_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(BuildError, match="cannot load"):
        load(broken)
