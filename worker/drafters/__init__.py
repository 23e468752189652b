"""Guessing what a sequence goes on with. A drafter is one file here and one line in `registry.py`."""
