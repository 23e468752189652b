"""Checkpoints in few bits: how they lie on disk, how they are loaded and how they are made.

A `Layout` is one way to store a quantised matrix; `layouts.py` finds a checkpoint's by its
quantization_config. `load.py` rewrites a decoder's linear layers as it fills them, from such a
checkpoint or from a dense one; `save.py` writes the former from the latter.
"""
