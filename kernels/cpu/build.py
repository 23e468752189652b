"""Builds the native CPU kernels on the machine they run on, once, and loads them.

The sources in `native/` know nothing of torch, so they compile in seconds. The result is kept under
a key of everything it depends on: sources, flags, compiler, processor, OpenMP runtime. It is linked
against the very OpenMP library that torch has loaded: two runtimes would mean two teams of threads
spinning on the same cores.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401  (loads the OpenMP runtime that is looked for below)

from kernels.cpu.library import Library
from kernels.cpu.ops import NativeOps

_SOURCES = Path(__file__).parent / "native"
_UNITS = ("attention.cpp", "linear.cpp", "decoder.cpp", "chain.cpp", "ops.cpp", "sampling.cpp")
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # lanes are read as one float or two bf16
    "-fno-math-errno",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
)
_RUNTIMES = ("libgomp", "libiomp5", "libomp")
_TIMEOUT = 300.0  # seconds for one compiler run; it takes about five


class BuildError(RuntimeError):
    """The native kernels cannot be built or loaded here; the message says why in one line."""


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What a build depends on besides its sources."""

    compiler: str  # path
    version: str  # first line of --version
    flags: tuple[str, ...]
    processor: str  # its instruction set extensions
    openmp: str  # path of the runtime torch uses

    def key(self) -> str:
        """A name for the result of building the sources with this toolchain."""
        digest = hashlib.sha256(repr(self).encode())
        for source in sorted(_SOURCES.iterdir()):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
        return digest.hexdigest()[:24]


def find_toolchain(compilers: tuple[str, ...] = ("g++", "c++", "clang++")) -> Toolchain:
    """The first usable compiler of `compilers` (names or paths), and what it builds for.

    Raises BuildError where there is none, or no OpenMP runtime of torch's can be found.
    """
    runtimes = openmp_runtimes()
    if len(runtimes) != 1:
        raise BuildError(f"expected one OpenMP runtime in the process, found {runtimes or 'none'}")
    tune = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    for name in compilers:
        path = shutil.which(name)
        if path is None:
            continue
        version = _run([path, "--version"]).splitlines()[0]
        # Clang's OpenMP code needs LLVM's runtime; GCC's runs on any of them.
        if "clang" in version and "libgomp" in runtimes[0]:
            continue
        return Toolchain(path, version, (tune, *_FLAGS), _processor(), runtimes[0])
    raise BuildError(f"no C++ compiler for {Path(runtimes[0]).name} among {', '.join(compilers)}")


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP libraries mapped into this process (Linux)."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError as error:
        raise BuildError("cannot tell which OpenMP runtime torch uses on this system") from error
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(_RUNTIMES))


def build(folder: Path, toolchain: Toolchain | None = None) -> Path:
    """Compiles the kernels into `folder`, or finds them there. Returns the library's path.

    Safe to call from several processes at once: the library appears by an atomic rename. Raises
    BuildError.
    """
    toolchain = toolchain or find_toolchain()
    target = folder / f"foresight-cpu-{toolchain.key()}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
            library = _compile(toolchain, Path(scratch))
            library.replace(target)
    except OSError as error:
        raise BuildError(f"cannot write native kernels to {folder}: {error}") from error
    return target


def load(path: Path) -> NativeOps:
    """Opens a library made by `build`. Raises BuildError if it would bring a second OpenMP."""
    before = openmp_runtimes()
    try:
        library = Library(str(path))
    except OSError as error:
        raise BuildError(f"cannot load native kernels: {error}") from error
    if openmp_runtimes() != before:
        raise BuildError(f"{path.name} would bring a second OpenMP runtime: {openmp_runtimes()}")
    return NativeOps(library)


def start_build(folder: Path | None) -> Future[NativeOps]:
    """Builds and loads in a background thread; the future holds the kernels or a BuildError.

    folder: where to keep the library; None: a temporary folder, gone once it is loaded.
    """
    future: Future[NativeOps] = Future()

    def work() -> None:
        try:
            with contextlib.ExitStack() as stack:
                place = folder
                if place is None:
                    place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                future.set_result(load(build(place)))
        except BaseException as error:  # the waiting side raises it
            future.set_exception(error)

    threading.Thread(target=work, name="build-native-kernels", daemon=True).start()
    return future


def _compile(toolchain: Toolchain, scratch: Path) -> Path:
    """A compiler run for each source file, as many at a time as processors, then the linker."""
    compiler = toolchain.compiler
    objects = [scratch / f"{unit}.o" for unit in _UNITS]
    commands = [
        [compiler, *toolchain.flags, "-c", str(_SOURCES / unit), "-o", str(out)]
        for unit, out in zip(_UNITS, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    library = scratch / "library.so"
    # No -fopenmp here: it would name the compiler's own runtime. Torch's is named instead.
    link = [compiler, "-shared", *map(str, objects), toolchain.openmp]
    _run([*link, f"-Wl,-rpath,{Path(toolchain.openmp).parent}", "-o", str(library)])
    return library


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"cannot run {command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {_first_error(done.stderr)}")
    return done.stdout or "unknown"


def _first_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no message")


def _processor() -> str:
    """The processor's features as Linux lists them: a library runs only where they are equal."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.split(":", 1)[1].split()))
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"
