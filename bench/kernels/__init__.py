"""Micro-benchmarks of the kernels: `pytest bench/kernels --benchmark-only`."""
