"""The kernel library: tensors in, tensors out. Imports torch and triton, nothing of this project's own."""

from sr_kernels.attention import varlen_attention
from sr_kernels.routing import layer_stats, route

__all__ = ["layer_stats", "route", "varlen_attention"]
