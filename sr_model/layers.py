"""The parts of a DiT block: rotary embedding with QK-norm, self- and cross-attention, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sr_kernels.attention import dense_attention, varlen_attention


def rope_frequencies(count: int, base: float, device: torch.device) -> Tensor:
    """base^(-i / count), i = 0..count-1: [count] fp32."""
    return base ** (-torch.arange(count, device=device, dtype=torch.float32) / count)


def rotation(angles: Tensor) -> Tensor:
    """Cosines and sines [2, T, hd/2] of angles [T, hd/2]."""
    return torch.stack([angles.cos(), angles.sin()])


def text_rope(positions: Tensor, head_dim: int, base: float) -> Tensor:
    """Rotation of the 1-D RoPE: positions [T] -> [2, T, hd/2] fp32."""
    return rotation(positions[:, None] * rope_frequencies(head_dim // 2, base, positions.device))


def image_rope(
    rows: int, columns: int, head_dim: int, base: float, device: torch.device, start: Tensor | None = None
) -> Tensor:
    """Rotation of the 2-D RoPE, tokens row by row: [2, rows*columns, hd/2] fp32; first hd/4 by row, next by column.

    start: [B], the number of each sample's first row and column; then [2, B*rows*columns, hd/2], sample by sample.
    """
    frequencies = rope_frequencies(head_dim // 4, base, device)
    first = torch.zeros(1, device=device) if start is None else start
    by_row = (first[:, None] + torch.arange(rows, device=device))[:, :, None, None] * frequencies  # [B, rows, 1, hd/4]
    by_column = (first[:, None] + torch.arange(columns, device=device))[:, None, :, None] * frequencies
    shape = (first.numel(), rows, columns, head_dim // 4)
    return rotation(torch.cat([by_row.expand(shape), by_column.expand(shape)], -1).flatten(0, 2))


def qk_norm_rope(x: Tensor, weight: Tensor, rope: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the head dim, then rotation of the pairs (i, i + hd/2); fp32 inside, one rounding.

    x: [..., T, heads, hd]; weight: broadcastable to x; rope: cosines and sines [2, T, hd/2], or None for no
    rotation.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.rms_norm(x.to(wide), (x.shape[-1],), eps=eps) * weight
    if rope is not None:
        cos, sin = rope[:, :, None].to(wide).unbind()  # [T, 1, hd/2]
        a, b = y.chunk(2, -1)
        y = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return y.to(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention among a sample's image tokens, with QK-norm and 2-D RoPE."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.eps = heads, kv_heads, head_dim, eps
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        self.q_norm = nn.Parameter(torch.ones(head_dim))
        self.k_norm = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x [B, N, H], rope [2, N, hd/2] -> [B, N, H]."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))  # [B, N, Hq, hd]
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))  # [B, N, Hkv, hd]
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        q = qk_norm_rope(q, self.q_norm, rope, self.eps)
        k = qk_norm_rope(k, self.k_norm, rope, self.eps)
        out = dense_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o_proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Image queries (QK-norm, not rotated) on a prompt's keys and values, which come ready from the conditioner."""

    def __init__(self, hidden: int, heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.eps = heads, head_dim, eps
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        self.q_norm = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_k: int) -> Tensor:
        """x [B, N, H]; k, v [T, Hkv, hd] packed with bounds cu_k [B+1]; cu_q the image's bounds -> [B, N, H]."""
        batch, n, _ = x.shape
        q = self.q_proj(x).view(batch * n, self.heads, self.head_dim)
        q = qk_norm_rope(q, self.q_norm, None, self.eps)
        k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast the conditioner's products may stay in fp32
        out = varlen_attention(q, k, v, cu_q, cu_k, n, max_k)  # [B*N, Hq, hd]
        return self.o_proj(out.reshape(batch, n, -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of selective checkpointing: outputs of matrix products and attention are kept, the rest is redone."""
    dear = op in PRODUCTS or "attention" in str(op) or "attn" in str(op)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


# reentrant checkpointing would drop gradients that travel inside objects, and cannot be compiled
CHECKPOINTING: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": partial(checkpoint, use_reentrant=False),
    "selective": partial(
        checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, keep_products)
    ),
}


class RecomputingBlock(nn.Module):
    """A block whose `run` may be done again in the backward pass.

    checkpointing: what the backward pass recomputes: "none", "full" (all of the block) or "selective" (all but matrix
        products and attention: half the memory for a few percent of time).
    """

    checkpointing = "none"

    def forward(self, *args: Any) -> Tensor:
        """`run`, under the chosen checkpointing."""
        recompute = CHECKPOINTING[self.checkpointing]
        if recompute is None or not torch.is_grad_enabled():
            return self.run(*args)
        return recompute(self.run, *args)

    def run(self, *args: Any) -> Tensor:
        """The block itself."""
        raise NotImplementedError


class Block(RecomputingBlock):
    """Self-attention, cross-attention (on an input that is not normed), SwiGLU; each added to the residual stream."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, inner: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(hidden, eps=eps)
        self.self_attn = SelfAttention(hidden, heads, kv_heads, head_dim, eps)
        self.cross_attn = CrossAttention(hidden, heads, head_dim, eps)
        self.norm2 = nn.RMSNorm(hidden, eps=eps)
        self.mlp = SwiGLU(hidden, inner)

    def run(self, x: Tensor, k: Tensor, v: Tensor, rope: Tensor, cu_q: Tensor, cu_k: Tensor, max_k: int) -> Tensor:
        """x [B, N, H], k and v [T, Hkv, hd] of this block, rope [2, N, hd/2], bounds as in `varlen_attention` -> x."""
        x = x + self.self_attn(self.norm1(x), rope)
        x = x + self.cross_attn(x, k, v, cu_q, cu_k, max_k)
        return x + self.mlp(self.norm2(x))
