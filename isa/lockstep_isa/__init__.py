"""The contract of Lockstep: configuration, instructions, registers, error codes and golden numerics."""
