"""Devices without a board: the Verilated core, the fast core and the memory model."""
