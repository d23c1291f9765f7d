"""Attention operators of HSA-UltraLong. This package knows tensors only and imports nothing else of the project."""

from hsa_kernels.ops import hsa_attention, hsa_decode, select_chunks, selection_weights, sliding_window_attention

__all__ = ["hsa_attention", "hsa_decode", "select_chunks", "selection_weights", "sliding_window_attention"]
