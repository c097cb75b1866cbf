"""Benchmarks: kernels (pytest-benchmark), and the bytes-and-flops model they are held to."""
