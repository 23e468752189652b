"""A device that is never done before it is waited for, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from worker.transfer import HostTransfer, Span

GARBAGE = 99


class LateSpan:
    """Until it is waited for, what was fetched is garbage."""

    def __init__(self) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.ended = self.waited = False

    def end(self) -> None:
        self.ended = True

    def wait(self) -> None:
        assert self.ended
        with torch.inference_mode():
            for host, value in self.copies:
                host.copy_(value)
        self.waited = True

    def seconds(self) -> float:
        assert self.waited
        return 1e-3


class LateTransfer(HostTransfer):
    """Fetches as late as a GPU may: everything launched later has been launched by then."""

    def __init__(self) -> None:
        self.spans: list[LateSpan] = []
        self.sent = 0

    def begin(self) -> Span:
        self.spans.append(LateSpan())
        return self.spans[-1]

    def send(self, *parts: Sequence[int]) -> list[Tensor]:
        self.sent += 1
        return super().send(*parts)

    def fetch(self, tensor: Tensor) -> Tensor:
        host = torch.full_like(tensor, GARBAGE if tensor.dtype != torch.bool else False)
        self.spans[-1].copies.append((host, tensor.clone()))
        return host


class Again:
    """Records a step by remembering it."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            run()

        return replay
