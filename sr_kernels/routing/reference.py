"""Routing in plain torch: the definition the kernels are held to. Differentiable in `hidden` and in `weights`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LN_EPS = 1e-5  # eq. 2's LayerNorm: no weight, no bias


def stack(hidden: Tensor | Sequence[Tensor]) -> Tensor:
    """One [L, T, C] tensor from either form of `hidden`."""
    return hidden if isinstance(hidden, Tensor) else torch.stack(tuple(hidden))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 inside, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def layer_stats(hidden: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation over C, exact two-pass variance: hidden [L,T,C] -> two of [L,T]."""
    x = stack(hidden)
    x = x.to(accumulate_dtype(x.dtype))
    mean = x.mean(-1)  # [L, T]
    variance = (x - mean[..., None]).square().mean(-1)
    return mean, torch.rsqrt(variance + LN_EPS)


def sample_of_token(cu_seqlens: Tensor, total: int) -> Tensor:
    """Index of the sample each packed token belongs to: [B+1] -> [total] int64, with no synchronisation."""
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths, output_size=total)


def normalize(hidden: Tensor | Sequence[Tensor], stats: tuple[Tensor, Tensor] | None) -> Tensor:
    """LN(hidden) [L, T, C] in the accumulation dtype."""
    x = stack(hidden)
    mean, rstd = layer_stats(x) if stats is None else stats
    return (x.to(accumulate_dtype(x.dtype)) - mean[..., None]) * rstd[..., None]


def route(
    hidden: Tensor | Sequence[Tensor],
    weights: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    stats: tuple[Tensor, Tensor] | None = None,
    return_sumsq: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out[d,t,:] = sum_l weights[b(t),d,l] LN(hidden[l,t,:]); shapes as in `sr_kernels.route`."""
    dtype = hidden.dtype if isinstance(hidden, Tensor) else hidden[0].dtype
    xhat = normalize(hidden, stats)  # [L, T, C]
    w = weights.to(xhat.dtype)
    with torch.autocast(xhat.device.type, enabled=False):  # it would cast the products down
        if w.ndim == 2:
            out = torch.einsum("dl,ltc->dtc", w, xhat)
        else:
            assert cu_seqlens is not None
            out = torch.einsum("tdl,ltc->dtc", w[sample_of_token(cu_seqlens, xhat.shape[1])], xhat)
    rounded = out.to(dtype).contiguous()  # the per-token product comes out token first
    return (rounded, out.square().sum(-1)) if return_sumsq else rounded  # [D, T, C], [D, T]


def route_backward(
    grad: Tensor,
    hidden: Tensor | Sequence[Tensor],
    *,
    stats: tuple[Tensor, Tensor],
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Gradient of the weights: d_weights[(b,)d,l] = sum over t,c of grad[d,t,c] LN(hidden)[l,t,c]; [D,L] or [B,D,L]."""
    xhat = normalize(hidden, stats)
    g = grad.to(xhat.dtype)
    with torch.autocast(xhat.device.type, enabled=False):
        per_token = torch.einsum("dtc,ltc->dl" if cu_seqlens is None else "dtc,ltc->tdl", g, xhat)
    if cu_seqlens is None:
        return per_token
    batch = cu_seqlens.numel() - 1
    zeros = per_token.new_zeros(batch, *per_token.shape[1:])
    return zeros.index_add_(0, sample_of_token(cu_seqlens, xhat.shape[1]), per_token)


def with_squares(grad: Tensor, out: Tensor | None, grad_squares: Tensor | None) -> Tensor:
    """grad plus what reaches out through its squares: d(sum out^2) = 2 out."""
    if out is None or grad_squares is None:
        return grad
    return grad + (2 * grad_squares[..., None] * out.to(grad_squares.dtype)).to(grad.dtype)
