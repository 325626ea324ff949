"""Counting what a run cost: FLOPs, bytes, time, fidelity."""
