"""Decoder-only language models: what is in a checkpoint and how a step runs through it."""
