"""What can be wrong with a checkpoint. Every message is one sentence for a person."""

from __future__ import annotations


class CheckpointError(Exception):
    """The checkpoint is missing, damaged, incomplete or in a format that is not read."""


class UnsupportedArchitecture(CheckpointError):  # noqa: N818 - the name says what it is
    """The checkpoint is intact, but nothing here computes its architecture."""
