"""Measured, self-checking benchmarks: what is timed, against what, and when a ratio may be printed."""
