"""Lists of words written as running text."""

from __future__ import annotations


def words(text: str) -> list[str]:
    """The words of a text, such as the lines of a long constant."""
    return text.split()
