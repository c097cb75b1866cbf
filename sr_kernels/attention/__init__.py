"""Attention over packed sequences: grouped-query, forward and backward, on whichever kernel the machine has."""

from sr_kernels.attention.op import backend_for, varlen_attention
from sr_kernels.attention.sdpa import dense_attention

__all__ = ["backend_for", "dense_attention", "varlen_attention"]
