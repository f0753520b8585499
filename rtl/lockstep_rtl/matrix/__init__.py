"""The MATRIX unit: sequencer, systolic array and the accumulator queue."""
