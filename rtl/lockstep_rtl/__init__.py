"""The Lockstep core in Amaranth."""
