"""Slow versions of the operators, written from the equations: explicit loops in float64."""
