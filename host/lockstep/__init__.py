"""Lockstep: one transformer, any silicon, the same bits."""
