"""`foresight COMMAND …`"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from cli.errors import CommandError

# Each module has `run(arguments) -> exit code` and a first docstring line that says what it does.
COMMANDS = {
    "serve": ("cli.serve", "serve a model over the OpenAI API"),
    "simulate": ("cli.simulate", "run a trace through the scheduler in virtual time"),
    "plan": ("cli.plan", "find how many replicas a load needs"),
    "chat": ("cli.chat", "talk to a server from the terminal"),
    "profile": ("cli.profile", "measure what steps cost on this machine"),
    "calibrate": ("cli.calibrate", "choose a KV format, and fit it to a model, by your prompts"),
    "quantize": ("cli.quantize", "write a checkpoint in few bits, and measure what that costs"),
    "version": ("cli.version", "print the version"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Whatever the user can mend is one sentence on stderr and exit code 1."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0
    name = "version" if given[0] == "--version" else given[0]
    if name not in COMMANDS:
        print(f"foresight: unknown command {name!r}; try foresight --help.", file=sys.stderr)
        return 1
    try:
        code: int = importlib.import_module(COMMANDS[name][0]).run(given[1:])
    except CommandError as error:
        print(f"foresight: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def usage() -> str:
    lines = [f"  {name:<11}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: foresight COMMAND ...", "", *lines, "", "foresight COMMAND --help"])
