"""Attention over packed sequences: grouped-query, forward and backward, on whichever kernel the machine has."""

from sr_kernels.attention.op import backend_for, varlen_attention

__all__ = ["backend_for", "varlen_attention"]
