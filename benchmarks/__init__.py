"""Benchmarks: each is a module with a `--help`, a table and a last line of JSON.

They stand outside the server and use it as any client would. `benchmarks/report.py` holds what
they share: the machine's description, medians with intervals, the table and the JSON line.
"""
