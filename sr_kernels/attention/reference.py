"""Packed attention in plain torch, one sequence at a time, fp32 inside: what the backends are held to."""

from __future__ import annotations

import torch
from torch import Tensor


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v per sequence; shapes as in `sr_kernels.varlen_attention`."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    pieces = []
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        qi = q[q0:q1].to(wide).transpose(0, 1)  # [Hq, nq, hd]
        ki = k[k0:k1].to(wide).transpose(0, 1).repeat_interleave(group, 0)  # [Hq, nk, hd]
        vi = v[k0:k1].to(wide).transpose(0, 1).repeat_interleave(group, 0)
        with torch.autocast(q.device.type, enabled=False):  # fp32 also where the products would be cast down
            scores = qi @ ki.transpose(1, 2) * q.shape[-1] ** -0.5  # [Hq, nq, nk]
            if causal:  # the last query sees the last key; one that sees no key gives 0
                unseen = torch.ones_like(scores[0], dtype=torch.bool).triu(1 + (k1 - k0) - (q1 - q0))
                shares = scores.masked_fill(unseen, float("-inf")).softmax(-1).masked_fill(unseen, 0)
            else:
                shares = scores.softmax(-1)
            pieces.append((shares @ vi).transpose(0, 1))
    return torch.cat(pieces).to(q.dtype)  # [Tq, Hq, hd]
