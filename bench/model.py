"""Bytes and flops of the kernels, from their shapes alone: what must move, whatever the implementation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Routing:
    """One routing call: hidden [L, T, C] with `itemsize` bytes an element, D blocks."""

    layers: int
    blocks: int
    tokens: int
    channels: int
    itemsize: int

    @property
    def row_bytes(self) -> int:
        """One [T, C] tensor."""
        return self.tokens * self.channels * self.itemsize

    @property
    def forward_bytes(self) -> int:
        """Hidden read once and out written once; weights and statistics are nothing beside them."""
        return self.row_bytes * (self.layers + self.blocks)

    @property
    def backward_bytes(self) -> int:
        """Hidden and the gradient of out, each read once."""
        return self.forward_bytes

    @property
    def stats_bytes(self) -> int:
        """Hidden read once."""
        return self.row_bytes * self.layers

    @property
    def layernorm_einsum_bytes(self) -> int:
        """The ideal form of LayerNorm, then a product: hidden read, its norm written and read, out written."""
        return self.row_bytes * (3 * self.layers + self.blocks)

    @property
    def loop_bytes(self) -> int:
        """One output a call: hidden read again for every block."""
        return self.row_bytes * self.blocks * (self.layers + 1)

    @property
    def flops(self) -> int:
        """The [D x L] by [L x C] product of every token, forward or backward."""
        return 2 * self.layers * self.blocks * self.tokens * self.channels


@dataclass(frozen=True)
class Attention:
    """Packed attention: per sample (queries, keys), shared head dim."""

    lengths: tuple[tuple[int, int], ...]
    q_heads: int
    kv_heads: int
    head_dim: int
    itemsize: int

    @property
    def forward_bytes(self) -> int:
        """q, k and v read once, out written once."""
        queries, keys = (sum(n) for n in zip(*self.lengths, strict=True))
        return 2 * self.itemsize * self.head_dim * (queries * self.q_heads + keys * self.kv_heads)

    @property
    def flops(self) -> int:
        """q k^T and its product with v."""
        return 4 * self.q_heads * self.head_dim * sum(q * k for q, k in self.lengths)


def floor_seconds(
    n_bytes: int, bytes_per_second: float, flops: int = 0, flops_per_second: float = float("inf")
) -> float:
    """The roofline: no implementation is faster."""
    return max(n_bytes / bytes_per_second, flops / flops_per_second)
