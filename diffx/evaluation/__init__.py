"""Benchmarks and probes: suites of ``diffx eval``."""
