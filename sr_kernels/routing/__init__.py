"""Routing: LayerNorm and convex weighted summation over all LLM layers (eq. 2), for every DiT block in one call."""

from sr_kernels.routing.op import backend_for, layer_stats, route

__all__ = ["backend_for", "layer_stats", "route"]
