"""Benchmarks: cases with a limit from first principles, measured on a core and compared bit for bit in the same run."""
