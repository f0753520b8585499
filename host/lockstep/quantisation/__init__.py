"""Weights in int4 and with zeros: choosing them, and reading and writing checkpoints that hold them."""
