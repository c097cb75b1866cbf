"""The conditioner: text features and fusion weights -> keys and values of every block, in one batched step.

The context embedder, RMSNorm(C) with weight g and Linear(C, C) with weight W_e and bias b_e, can be folded into each
block's K/V projection W_d: with r the row factor of the RMSNorm,

    W_d (W_e (g * r * h) + b_e)  =  r * (W_d W_e diag(g)) h  +  W_d b_e

which is exact. The fold costs D * 2 Hkv hd * C * C multiply-adds whatever the number of tokens, and saves the
embedder's C * C for every token of every fused state; a rule on the token count chooses (`Conditioner.folds`).
"""

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

    fold: whether the context embedder is folded into the projections: None by the rule, True and False always and never
        (to compare them).
    """

    fold: bool | None = None

    def __init__(self, depth: int, text_dim: int, kv_heads: int, head_dim: int, rope_base: float | None, eps: float):
        super().__init__()
        self.depth, self.kv_heads, self.head_dim, self.rope_base, self.eps = depth, kv_heads, head_dim, rope_base, eps
        self.norm = nn.RMSNorm(text_dim, eps=eps)
        self.embed = nn.Linear(text_dim, text_dim)
        self.kv_weight = nn.Parameter(torch.empty(depth, 2 * kv_heads * head_dim, text_dim))  # keys, then values
        self.k_norm = nn.Parameter(torch.ones(depth, head_dim))
        for weight in self.kv_weight.detach().unbind():  # per projection, so that the fans are those of one Linear
            for half in weight.chunk(2):
                nn.init.xavier_uniform_(half)

    def folds(self, tokens: int, rows: int, times: int = 1) -> bool:
        """Whether folding is the cheaper way for `tokens` text tokens and `rows` fused states (1 or D) a token.

        times: how often keys and values are made with what `folded` gives once (sampling steps). A backward pass costs
        both ways twice their forward pass, so that the rule is the same in training.
        """
        if self.fold is not None:
            return self.fold
        return times * tokens * rows > self.depth * 2 * self.kv_heads * self.head_dim

    def folded(self) -> tuple[Tensor, Tensor]:
        """W_d W_e diag(g) [D, 2 Hkv hd, C] and W_d b_e [D, 2 Hkv hd] in the parameters' dtype."""
        dtype = self.kv_weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        embed = (self.embed.weight.to(wide) * self.norm.weight).to(dtype)  # [C, C]
        return self.kv_weight @ embed, self.kv_weight @ self.embed.bias

    @staticmethod
    def _project(x: Tensor, weight: Tensor) -> Tensor:
        """x [1|D, T, C] times weight [D, K, C] -> [D, T, K]; depth-shared states in one product of all blocks."""
        if x.shape[0] == 1:
            return F.linear(x[0], weight.flatten(0, 1)).unflatten(-1, (weight.shape[0], -1)).transpose(0, 1)
        return torch.bmm(x, weight.transpose(1, 2))

    def forward(
        self, text: TextFeatures, alpha: Tensor, folded: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """alpha [1|B, 1|D, L] over text's L layers -> k, v, each [D, T, Hkv, hd] in the parameters' dtype.

        folded: what `folded` gave for these parameters, where it is there already.
        """
        dtype = self.kv_weight.dtype
        shared = alpha.shape[0] == 1
        weights = alpha[0] if shared else alpha
        cu_seqlens, stats = None if shared else text.cu_seqlens, (text.mean, text.rstd)
        rows, tokens = alpha.shape[1], text.cu_seqlens_host[-1]
        if folded is not None or self.folds(tokens, rows):
            fused, squares = route(text.hidden, weights, cu_seqlens=cu_seqlens, stats=stats, return_sumsq=True)
            factor = torch.rsqrt(squares / text.width + self.eps)[..., None]  # [1|D, T, 1], the RMSNorm's
            weight, bias = self.folded() if folded is None else folded
            kv = torch.addcmul(bias[:, None].to(factor.dtype), self._project(fused.to(dtype), weight), factor).to(dtype)
        else:
            fused = route(text.hidden, weights, cu_seqlens=cu_seqlens, stats=stats)
            assert isinstance(fused, Tensor)
            kv = self._project(self.embed(self.norm(fused.to(dtype))), self.kv_weight)  # [D, T, 2*Hkv*hd]
        k, v = kv.unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(2)  # [D, T, Hkv, hd]
        rope = None if self.rope_base is None else text_rope(text.positions(), self.head_dim, self.rope_base)
        return qk_norm_rope(k, self.k_norm[:, None, None], rope, self.eps), v.contiguous()
