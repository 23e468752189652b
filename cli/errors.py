"""What ends a command with one sentence."""

from __future__ import annotations


class CommandError(Exception):
    """The command cannot do what it was asked. The message is one sentence for a person."""
