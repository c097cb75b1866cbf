"""`route` and `layer_stats`: checks, registration with torch.library, autograd, and the choice of backend."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sr_kernels import backends, checks
from sr_kernels.routing import reference

VARIABLE = "SR_KERNELS_BACKEND"
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIBRARY = torch.library.Library("sr_kernels", "FRAGMENT")


def backend_for(device: torch.device, requested: str | None = None, dtype: torch.dtype = torch.float32) -> str:
    """Name of the routing backend that runs on `device`; see `sr_kernels.backends.choose` for the errors."""
    usable: dict[str, str | None] = {"reference": None}
    triton = "it has no fp64 kernel" if dtype == torch.float64 else _triton_reason(device)
    usable = {"triton": triton, **usable} if device.type == "cuda" else {**usable, "triton": triton}
    return backends.choose(requested, VARIABLE, usable, f"routing on {device.type}")


def _triton_reason(device: torch.device) -> str | None:
    """None when the Triton kernels run on `device`, else why not; constants only, for torch.compile to trace."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and TRITON_INTERPRETED):
        return None
    return "it needs a CUDA device (or, on a CPU, TRITON_INTERPRET=1)"


def _check_hidden(hidden: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The op's list form of `hidden`: one [L,T,C] tensor, or L tensors [T,C]."""
    if isinstance(hidden, Tensor):
        checks.tensor("hidden", hidden, ndim=3)
        layers = [hidden]
    else:
        layers = list(hidden)
        if not layers:
            checks.fail("hidden", "at least one layer", "an empty sequence")
        for i, layer in enumerate(layers):
            checks.tensor(f"hidden[{i}]", layer, ndim=2)
            if layer.shape != layers[0].shape or layer.dtype != layers[0].dtype:
                checks.fail(
                    f"hidden[{i}]",
                    f"shape {list(layers[0].shape)} and {layers[0].dtype} (those of hidden[0])",
                    f"{list(layer.shape)} and {layer.dtype}",
                )
        checks.same_device("hidden[0]", layers[0].device, **{f"hidden[{i}]": x for i, x in enumerate(layers)})
    for i, layer in enumerate(layers):
        if 0 in layer.shape:
            checks.fail("hidden", "no empty dimension", f"shape {list(layer.shape)}")
        if layer.stride(-1) != 1:
            checks.fail(f"hidden[{i}]", "a last dimension of stride 1", f"strides {layer.stride()}")
        if layer.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "hidden: the LLM is frozen, so hidden must not require grad; detach it, or use "
                "sr_kernels.routing.reference.route, which differentiates through it"
            )
    return layers


def _unlist(layers: list[Tensor]) -> Tensor | list[Tensor]:
    return layers[0] if layers[0].ndim == 3 else layers


def _sizes(layers: list[Tensor]) -> tuple[int, int, int]:
    first = layers[0]
    return (len(layers) if first.ndim == 2 else first.shape[0]), first.shape[-2], first.shape[-1]


LIBRARY.define("layer_stats(Tensor[] hidden, str backend) -> (Tensor, Tensor)")
LIBRARY.define(
    "route(Tensor[] hidden, Tensor weights, Tensor mean, Tensor rstd, Tensor? cu_seqlens, bool sumsq, str backend)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define(
    "route_backward(Tensor grad, Tensor[] hidden, Tensor mean, Tensor rstd, Tensor? cu_seqlens, str backend) -> Tensor"
)


@torch.library.impl(LIBRARY, "layer_stats", "CompositeExplicitAutograd")
def _layer_stats(hidden: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from sr_kernels.routing import launch

        return launch.layer_stats(hidden)
    return reference.layer_stats(_unlist(hidden))


@torch.library.register_fake("sr_kernels::layer_stats")
def _layer_stats_fake(hidden: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    n_layers, tokens, _ = _sizes(hidden)
    dtype = reference.accumulate_dtype(hidden[0].dtype)
    return hidden[0].new_empty(n_layers, tokens, dtype=dtype), hidden[0].new_empty(n_layers, tokens, dtype=dtype)


@torch.library.impl(LIBRARY, "route", "CompositeExplicitAutograd")
def _route(
    hidden: list[Tensor],
    weights: Tensor,
    mean: Tensor,
    rstd: Tensor,
    cu_seqlens: Tensor | None,
    sumsq: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from sr_kernels.routing import launch

        return launch.route(hidden, weights, mean, rstd, cu_seqlens, sumsq)
    out = reference.route(_unlist(hidden), weights, cu_seqlens=cu_seqlens, stats=(mean, rstd), return_sumsq=sumsq)
    return (out[0], out[1].contiguous()) if isinstance(out, tuple) else (out, mean.new_empty(0))


@torch.library.register_fake("sr_kernels::route")
def _route_fake(
    hidden: list[Tensor],
    weights: Tensor,
    mean: Tensor,
    rstd: Tensor,
    cu_seqlens: Tensor | None,
    sumsq: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _, tokens, channels = _sizes(hidden)
    blocks = weights.shape[-2]
    return hidden[0].new_empty(blocks, tokens, channels), mean.new_empty((blocks, tokens) if sumsq else 0)


@torch.library.impl(LIBRARY, "route_backward", "CompositeExplicitAutograd")
def _route_backward(
    grad: Tensor, hidden: list[Tensor], mean: Tensor, rstd: Tensor, cu_seqlens: Tensor | None, backend: str
) -> Tensor:
    if backend == "triton":
        from sr_kernels.routing import launch

        return launch.route_backward(grad, hidden, mean, rstd, cu_seqlens)
    return reference.route_backward(grad, _unlist(hidden), stats=(mean, rstd), cu_seqlens=cu_seqlens)


@torch.library.register_fake("sr_kernels::route_backward")
def _route_backward_fake(
    grad: Tensor, hidden: list[Tensor], mean: Tensor, rstd: Tensor, cu_seqlens: Tensor | None, backend: str
) -> Tensor:
    n_layers = _sizes(hidden)[0]
    shape = (grad.shape[0], n_layers)
    return mean.new_empty(shape if cu_seqlens is None else (cu_seqlens.shape[0] - 1, *shape))


class _Route(torch.autograd.Function):
    """Gradient to the weights only: hidden comes from a frozen LLM."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        hidden: list[Tensor],
        mean: Tensor,
        rstd: Tensor,
        cu_seqlens: Tensor | None,
        sumsq: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        out, squares = torch.ops.sr_kernels.route(hidden, weights, mean, rstd, cu_seqlens, sumsq, backend)
        ctx.save_for_backward(mean, rstd, cu_seqlens, out if sumsq else None, *hidden)
        ctx.per_sample, ctx.backend, ctx.dtype = weights.ndim == 3, backend, weights.dtype
        if not sumsq:
            ctx.mark_non_differentiable(squares)
        return out, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_squares: Tensor) -> tuple[Tensor | None, ...]:
        mean, rstd, cu_seqlens, out, *hidden = ctx.saved_tensors
        if out is not None:  # d(sum out^2) = 2 out
            grad = grad + (2 * grad_squares[..., None] * out.to(grad_squares.dtype)).to(grad.dtype)
        segments = cu_seqlens if ctx.per_sample else None
        d_weights = torch.ops.sr_kernels.route_backward(grad, hidden, mean, rstd, segments, ctx.backend)
        return d_weights.to(ctx.dtype), None, None, None, None, None, None


def layer_stats(hidden: Tensor | Sequence[Tensor], *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """LayerNorm statistics over the channels, taken once per set of features.

    Args:
        hidden: [L, T, C], or a sequence of L tensors [T, C]; fp32, fp16, bf16 (or fp64).
        backend: "triton" or "reference"; default by device.

    Returns: (mean, rstd), each [L, T], fp32 (fp64 for fp64 input): exact two-pass variance, eps 1e-5 (eq. 2).

    Raises: ValueError or TypeError naming the argument, from metadata alone.
    """
    layers = _check_hidden(hidden)
    return torch.ops.sr_kernels.layer_stats(layers, backend_for(layers[0].device, backend, layers[0].dtype))


def route(
    hidden: Tensor | Sequence[Tensor],
    weights: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    stats: tuple[Tensor, Tensor] | None = None,
    return_sumsq: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Fuse the LLM's layers for all D blocks at once (eq. 2): out[d,t] = sum_l weights[b(t),d,l] LN(hidden[l,t]).

    Args:
        hidden: [L, T, C], or a sequence of L tensors [T, C] (never copied together); fp32, fp16, bf16 (or fp64).
        weights: [D, L] shared by the batch, or [B, D, L] per sample; fp32 (fp64 with fp64 hidden).
        cu_seqlens: [B+1] int32, the samples' bounds in T; needed with per-sample weights.
        stats: (mean, rstd), each [L, T], from `layer_stats`; taken here when None.
        return_sumsq: also return sum over c of out^2, [D, T]: the row factor of an RMSNorm that follows.
        backend: "triton" or "reference"; default by device, or SR_KERNELS_BACKEND.

    Returns: out [D, T, C] in hidden's dtype; with return_sumsq (out, sumsq [D, T] fp32). Gradient to weights only.

    Raises: ValueError or TypeError naming the argument, what is wanted and what came, from metadata alone.
    """
    layers = _check_hidden(hidden)
    n_layers, tokens, _ = _sizes(layers)
    wide = reference.accumulate_dtype(layers[0].dtype)
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: wanted a tensor, got {type(weights).__name__}")
    if weights.ndim not in (2, 3):
        checks.fail("weights", "[D, L] or [B, D, L]", f"shape {list(weights.shape)}")
    if weights.dtype != wide:
        checks.fail("weights", f"dtype {wide} for hidden of {layers[0].dtype}", weights.dtype)
    if weights.shape[-1] != n_layers or 0 in weights.shape:
        checks.fail("weights", f"{n_layers} layers in the last dimension, none empty", f"shape {list(weights.shape)}")
    if cu_seqlens is not None:
        checks.cu_seqlens("cu_seqlens", cu_seqlens, tokens)
    if weights.ndim == 3:
        if cu_seqlens is None:
            checks.fail("cu_seqlens", "[B+1] int32 with per-sample weights", None)
        elif cu_seqlens.numel() != weights.shape[0] + 1:
            checks.fail("cu_seqlens", f"{weights.shape[0] + 1} entries (weights has B={weights.shape[0]})",
                        f"{cu_seqlens.numel()}")  # fmt: skip
    chosen = backend_for(layers[0].device, backend, layers[0].dtype)
    if stats is None:
        stats = torch.ops.sr_kernels.layer_stats(layers, chosen)
    mean, rstd = stats
    for name, value in (("stats[0] (mean)", mean), ("stats[1] (rstd)", rstd)):
        checks.tensor(name, value, ndim=2, dtypes=(wide,))
        if tuple(value.shape) != (n_layers, tokens):
            checks.fail(name, f"shape [{n_layers}, {tokens}]", list(value.shape))
    checks.same_device("hidden", layers[0].device, weights=weights, cu_seqlens=cu_seqlens, mean=mean, rstd=rstd)
    out, squares = _Route.apply(weights, layers, mean, rstd, cu_seqlens, return_sumsq, chosen)
    return (out, squares) if return_sumsq else out
