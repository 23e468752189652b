"""Replays a Dockerfile target's steps without Docker: what it copies, installs, runs and answers.

    python -m deploy.replay --target cpu

A clean virtual environment stands for the image's Python and a temporary folder for its file
system. Every RUN line is executed there, with `apt-get install` turned into a simulation and the
steps that need root (`useradd`, `install`, `rm` of the package lists) only printed. COPY takes
exactly the files that .dockerignore lets through. At the end ENTRYPOINT and CMD are started on a
free loopback port, HEALTHCHECK must pass, a completion must be answered, and SIGTERM must end it
with status 0. What this cannot see: the base image itself, and the ordinary user's permissions.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from deploy.dockerfile import (
    Instruction,
    base_image,
    health_command,
    in_context,
    last,
    parse,
    steps,
)

root = Path(__file__).parent.parent

# Stand before everything else on PATH, so a RUN line can't change the machine it is replayed on.
stand_ins = {
    "apt-get": """[ "$1" = install ] || { echo "  not replayed: apt-get $*"; exit 0; }
for tool in /usr/bin/apt-get; do [ -x $tool ] && exec $tool --simulate "$@" >/dev/null; done
echo "  not replayed (no apt here): apt-get $*\"""",
    "useradd": 'echo "  not replayed (needs root): useradd $*"',
    "install": 'echo "  not replayed (needs root): install $*"',
    "rm": 'echo "  not replayed: rm $*"',
}


class Replay:
    """One target's file system and environment."""

    def __init__(self, folder: Path) -> None:
        self._image = folder / "image"
        self._workdir = self._image
        self._image.mkdir()
        tools = folder / "stand-ins"
        tools.mkdir()
        for name, script in stand_ins.items():
            (tools / name).write_text(f"#!/bin/sh\n{script}\n")
            (tools / name).chmod(0o755)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        # HOME stays: a machine's own package index is configured there.
        names = ("HOME", "PIP_", "LANG", "SSL_")
        keep = {name: value for name, value in os.environ.items() if name.startswith(names)}
        self.environment = keep | {
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PATH": f"{tools}:{folder / 'venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "PIP_RETRIES": "0",  # an index out of reach is skipped at once, not five times
        }

    def step(self, instruction: Instruction) -> None:
        """Raises `SystemExit` when the step fails."""
        print(f"{instruction.name} {instruction.text}", flush=True)
        match instruction.name:
            case "RUN":
                done = subprocess.run(
                    ["sh", "-eu", "-c", instruction.text], cwd=self._workdir, env=self.environment
                )
                if done.returncode:
                    raise SystemExit(f"this step failed with status {done.returncode}")
            case "WORKDIR":
                self._workdir = self._image / instruction.text.lstrip("/")
                self._workdir.mkdir(parents=True, exist_ok=True)
            case "ENV":
                pairs = (pair.partition("=") for pair in instruction.text.split())
                self.environment |= {name: value for name, _, value in pairs}
            case "COPY":
                *sources, target = instruction.text.split()
                for source in sources:
                    self._copy(source.rstrip("/"), target)

    def _copy(self, source: str, target: str) -> None:
        ignore = (root / ".dockerignore").read_text()
        prefix = "" if source == "." else source
        paths = [
            path
            for path in project_files()
            if in_context(path, ignore)
            and (not prefix or path == prefix or path.startswith(prefix + "/"))
        ]
        if not paths:
            raise SystemExit(f"COPY finds no {source} in the build context")
        for path in paths:
            # A folder's content goes into the target; a file into it under its own name.
            inner = path if not prefix else path.removeprefix(prefix).lstrip("/")
            to = self._workdir / target / (inner or Path(path).name)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / path, to)

    def serve(self, instructions: Sequence[Instruction], patience: float) -> None:
        """Starts what the image starts, until its health check passes; stops it with SIGTERM."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])

        def local(words: Sequence[str]) -> list[str]:
            return [w.replace("0.0.0.0", "127.0.0.1").replace("8000", port) for w in words]

        start = local(last(instructions, "ENTRYPOINT").words + last(instructions, "CMD").words)
        check = local(health_command(instructions))
        print("starts", *start, flush=True)
        server = subprocess.Popen(start, cwd=self._workdir, env=self.environment)
        try:
            deadline, began = time.monotonic() + patience, time.monotonic()
            while subprocess.run(check, env=self.environment, stderr=subprocess.DEVNULL).returncode:
                if server.poll() is not None:
                    raise SystemExit(f"the server ended with status {server.returncode}")
                if time.monotonic() > deadline:
                    raise SystemExit(f"the health check did not pass within {patience:g} s")
                time.sleep(0.5)
            print(f"healthy after {time.monotonic() - began:.1f} s", flush=True)
            print("answers", completion(f"http://127.0.0.1:{port}", patience), flush=True)
            server.send_signal(signal.SIGTERM)
            if status := server.wait(timeout=60):
                raise SystemExit(f"SIGTERM ended the server with status {status}")
        finally:
            server.kill()
            server.wait()


def project_files() -> list[str]:
    """Files of the checkout that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [path for path in out.splitlines() if (root / path).is_file()]


def completion(url: str, patience: float) -> str:
    """A short completion's text, as soon as the server is ready. Raises `OSError`."""
    deadline = time.monotonic() + patience
    while True:
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=5).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = json.dumps({"model": model, "prompt": "import", "max_tokens": 4, "temperature": 0})
    request = urllib.request.Request(
        f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return repr(json.load(answer)["choices"][0]["text"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", default="cpu", help="a stage of the Dockerfile (cpu)")
    parser.add_argument("--no-start", action="store_true", help="install only")
    parser.add_argument("--patience", type=float, default=120, help="seconds to become healthy")
    args = parser.parse_args(argv)
    stages = parse((root / "Dockerfile").read_text())
    if args.target not in stages:
        parser.error(f"no stage {args.target!r}; there are {', '.join(stages)}")
    instructions = steps(stages, args.target)
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        print(f"FROM {base_image(stages, args.target)} (a clean virtual environment stands for it)")
        replay = Replay(Path(folder))
        for instruction in instructions:
            replay.step(instruction)
        if not args.no_start:
            replay.serve(instructions, args.patience)
    print(f"replayed {len(instructions)} steps of target {args.target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
