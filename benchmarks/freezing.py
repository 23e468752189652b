"""Stops a server's processes while another server is measured on the same cores (Linux)."""

from __future__ import annotations

import os
import signal
from pathlib import Path


class ProcessTree:
    """A process and all its descendants, stopped and resumed together."""

    def __init__(self, pid: int) -> None:
        """Raises `ProcessLookupError` when there is no such process."""
        os.kill(pid, 0)
        self._pid = pid
        self._stopped: list[int] = []

    def pids(self) -> list[int]:
        """The process and its descendants, parents first."""
        parents: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                # The command stands in parentheses and may hold anything; ppid is two words on.
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
        out = [self._pid]
        for pid in out:  # grows while it is walked
            out += parents.get(pid, [])
        return out

    def stop(self) -> None:
        """Idempotent."""
        if not self._stopped:
            self._stopped = self.pids()
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Idempotent."""
        self._signal(signal.SIGCONT)
        self._stopped = []

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._stopped:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it ended meanwhile
