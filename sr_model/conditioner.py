"""The conditioner: text features and fusion weights -> keys and values of every block, in one batched step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sr_kernels import route
from sr_model.layers import qk_norm_rope, text_rope
from sr_model.text_features import TextFeatures


class Conditioner(nn.Module):
    """Eq. 2, then the context embedder shared by all blocks, then each block's K/V projection, k-norm and text RoPE.

    The K/V projections of all D blocks are one parameter, so that one batched product serves them.
    """

    def __init__(self, depth: int, text_dim: int, kv_heads: int, head_dim: int, rope_base: float | None, eps: float):
        super().__init__()
        self.kv_heads, self.head_dim, self.rope_base, self.eps = kv_heads, head_dim, rope_base, eps
        self.norm = nn.RMSNorm(text_dim, eps=eps)
        self.embed = nn.Linear(text_dim, text_dim)
        self.kv_weight = nn.Parameter(torch.empty(depth, 2 * kv_heads * head_dim, text_dim))  # keys, then values
        self.k_norm = nn.Parameter(torch.ones(depth, head_dim))
        for weight in self.kv_weight.detach().unbind():  # per projection, so that the fans are those of one Linear
            for half in weight.chunk(2):
                nn.init.xavier_uniform_(half)

    def forward(self, text: TextFeatures, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """alpha [1|B, 1|D, L] over text's L layers -> k, v, each [D, T, Hkv, hd] in the parameters' dtype."""
        depth = self.kv_weight.shape[0]
        shared = alpha.shape[0] == 1
        fused = route(
            text.hidden,
            alpha[0] if shared else alpha,
            cu_seqlens=None if shared else text.cu_seqlens,
            stats=(text.mean, text.rstd),
        )  # [1|D, T, C]
        assert isinstance(fused, Tensor)
        embedded = self.embed(self.norm(fused.to(self.kv_weight.dtype)))
        if embedded.shape[0] == 1:  # depth-shared: one product [T, C] . [C, D * 2 * Hkv * hd]
            kv = F.linear(embedded[0], self.kv_weight.flatten(0, 1)).unflatten(-1, (depth, -1)).transpose(0, 1)
        else:
            kv = torch.bmm(embedded, self.kv_weight.transpose(1, 2))  # [D, T, 2*Hkv*hd]
        k, v = kv.unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(2)  # [D, T, Hkv, hd]
        angles = None if self.rope_base is None else text_rope(text.positions(), self.head_dim, self.rope_base)
        return qk_norm_rope(k, self.k_norm[:, None, None], angles, self.eps), v.contiguous()
