"""Triton kernels and the host code that launches them. Imported only when a kernel is asked for: needs Triton."""

from hsa_kernels.triton import interpreter

if interpreter.enabled():
    interpreter.repair()
