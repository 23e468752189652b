"""Guesses of what a sequence goes on with. A drafter is a file and a line in `registry.py`."""
