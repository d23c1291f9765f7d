"""Benchmarks of the operators against what exists, in one run on one machine: `hsa bench kernels`."""
