"""Packed attention through torch's scaled_dot_product_attention on padded tensors: the CPU path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EXPLICIT_LIMIT = 256 * 256  # queries x keys of a sequence up to which the CPU's training path keeps the scores


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Grouped-query attention of equal-length sequences: q [B, Hq, n, hd], k and v [B, Hkv, m, hd] -> [B, Hq, n, hd].

    mask: bool, broadcastable to [B, 1, n, m], True where a key is seen; is_causal: instead of a mask. On a CPU a query
    that sees no key gives 0.

    torch's fused kernel, but on a CPU in half precision with gradients over short sequences plain products, which take
    a third of the time of its backward pass there (15 against 4 ms for 32 x 3 heads x 64 x 64, hd 64, bf16).
    """
    short = q.shape[2] * k.shape[2] <= EXPLICIT_LIMIT and q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type != "cpu" or not short or is_causal or not (torch.is_grad_enabled() and q.requires_grad):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
        )
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)  # [B, Hq, n, m], fp32 as the kernel's
    if mask is None:
        return scores.softmax(-1).to(q.dtype) @ v
    sees = mask.any(-1, keepdim=True)  # a query without keys gives 0, as the kernel's: it takes all here, to no effect
    scores = scores.masked_fill(~mask & sees, float("-inf"))
    return (scores.softmax(-1).to(q.dtype) @ v).masked_fill(~sees, 0)


def _slots(cu_seqlens: Tensor, total: int, longest: int) -> Tensor:
    """Row of each packed token in the padded [B * longest] layout: [total] int64."""
    lengths = cu_seqlens.diff()
    batch = lengths.numel()
    sample = torch.repeat_interleave(torch.arange(batch, device=lengths.device), lengths, output_size=total)
    return torch.arange(total, device=lengths.device) - cu_seqlens[sample] + sample * longest


def _pad(x: Tensor, slots: Tensor | None, batch: int, longest: int) -> Tensor:
    """[T, H, hd] -> [B, H, longest, hd]; a view when every sequence is `longest` tokens (slots is None)."""
    if slots is not None:
        x = x.new_zeros(batch * longest, *x.shape[1:]).index_copy(0, slots, x)
    return x.view(batch, longest, *x.shape[1:]).transpose(1, 2)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool = False,
) -> Tensor:
    """Shapes as in `sr_kernels.varlen_attention`; memory grows with B * max_q * max_k only under a mask."""
    batch = cu_seqlens_q.numel() - 1
    slots_q = None if q.shape[0] == batch * max_q else _slots(cu_seqlens_q, q.shape[0], max_q)
    slots_k = None if k.shape[0] == batch * max_k else _slots(cu_seqlens_k, k.shape[0], max_k)
    uniform = slots_q is None and slots_k is None
    is_causal = causal and uniform and max_q == max_k
    mask = None
    if slots_k is not None or (causal and not is_causal):
        at_q = torch.arange(max_q, device=q.device)[None, :, None]
        at_k = torch.arange(max_k, device=q.device)[None, None, :]
        lengths_k = cu_seqlens_k.diff()[:, None, None]
        mask = at_k < lengths_k  # [B, 1, max_k]
        if causal:
            lengths_q = cu_seqlens_q.diff()[:, None, None]
            mask = mask & (at_k <= at_q + lengths_k - lengths_q)
            mask = mask | ((at_k == 0) & (at_q >= lengths_q))  # padding queries see one key: no 0/0 in their rows
        mask = mask[:, None]  # [B, 1, 1|max_q, max_k]
    out = dense_attention(
        _pad(q, slots_q, batch, max_q), _pad(k, slots_k, batch, max_k), _pad(v, slots_k, batch, max_k), mask, is_causal
    )
    out = out.transpose(1, 2).reshape(batch * max_q, *q.shape[1:])
    return out if slots_q is None else out[slots_q]
