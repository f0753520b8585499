"""Benchmark cases: programs with a known limit, checked bit for bit."""
