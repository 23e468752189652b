"""`foresight` over the scripted worker: `python -m tests.cli.scripted serve …`."""

from __future__ import annotations

import sys
from functools import partial

import cli.serve
from cli.main import main
from engine.supervisor import RestartPolicy, Supervisor
from tests.engine.workers import BUILDER

if __name__ == "__main__":
    policy = RestartPolicy(first_backoff=0.01)
    cli.serve.Supervisor = partial(Supervisor, builder=BUILDER, policy=policy)
    sys.exit(main())
