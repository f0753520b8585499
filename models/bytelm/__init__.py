"""Byte-level language models trained on the sources of Python's standard library."""
