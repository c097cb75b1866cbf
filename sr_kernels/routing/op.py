"""`route` and `layer_stats`: checks, registration with torch.library, autograd, and the choice of backend."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sr_kernels import backends, checks
from sr_kernels.routing import hopper, native, reference

VARIABLE = "SR_KERNELS_BACKEND"
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIBRARY = torch.library.Library("sr_kernels", "FRAGMENT")


def backend_for(device: torch.device, requested: str | None = None, dtype: torch.dtype = torch.float32) -> str:
    """Name of the routing backend that runs on `device`; see `sr_kernels.backends.choose` for the errors.

    The environment variable is read when a kind of device and dtype is first seen.
    """
    return _chosen(device.type, requested, dtype)


@torch.compiler.assume_constant_result  # a compiled graph keeps its backend; the tracer must not follow a build
def _chosen(*asked: Any) -> str:
    """`_choose`, once for each of its inputs."""
    if asked not in _CHOSEN:
        _CHOSEN[asked] = _choose(*asked)
    return _CHOSEN[asked]


_CHOSEN: dict[tuple[Any, ...], str] = {}


def _choose(device: str, requested: str | None, dtype: torch.dtype) -> str:
    usable: dict[str, backends.Reason] = {"reference": None}
    asked = requested or os.environ.get(VARIABLE)
    if device == "cuda":  # after the reference, so that only a request chooses it
        usable["native"] = hopper.why_not if dtype in hopper.DTYPES else f"it has no CUDA kernel for {dtype}"
    elif device != "cpu":
        usable["native"] = f"it is for the CPU and CUDA, not {device}"
    elif dtype not in native.DTYPES:
        usable["native"] = f"it has no kernel for {dtype}"
    else:
        usable = {"native": native.why_not if asked else native.why_not_with_warning, **usable}
    triton = "it has no fp64 kernel" if dtype == torch.float64 else _triton_reason(device)
    usable = {"triton": triton, **usable} if device == "cuda" else {**usable, "triton": triton}
    if device == "cuda" and triton and dtype != torch.float64 and not asked:
        _warn_of_the_reference(triton)
    return backends.choose(requested, VARIABLE, usable, f"routing on {device}")


@functools.cache
def _warn_of_the_reference(reason: str) -> None:
    """Once a process."""
    warnings.warn(f"no Triton routing kernel, the slower reference runs: {reason}", stacklevel=2)


def _triton_reason(device: str) -> str | None:
    """None when the Triton kernels run on `device`, else why not."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if device == "cpu" and TRITON_INTERPRETED:
        return None
    if device != "cuda":
        return "it needs a CUDA device (or, on a CPU, TRITON_INTERPRET=1)"
    from triton import knobs

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # as Triton looks for it
    if knobs.build.impl is None and (compiler is None or shutil.which(compiler) is None):
        return f"no C compiler, which Triton builds its launcher with ({compiler or 'gcc or clang'} is not on the path)"
    return None


def _check_hidden(hidden: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The op's list form of `hidden`: one [L,T,C] tensor, or L tensors [T,C]."""
    if isinstance(hidden, Tensor):
        checks.tensor("hidden", hidden, ndim=3)
        layers = [hidden]
    else:
        layers = list(hidden)
        if not layers:
            checks.fail("hidden", "at least one layer", "an empty sequence")
        checks.tensor("hidden[0]", layers[0], ndim=2)
        _check_alike(layers)
    if 0 in layers[0].shape:
        checks.fail("hidden", "no empty dimension", f"shape {list(layers[0].shape)}")
    if not all(map(Tensor.is_contiguous, layers)):
        for i, layer in enumerate(layers):
            if layer.stride(-1) != 1:
                checks.fail(f"hidden[{i}]", "a last dimension of stride 1", f"strides {layer.stride()}")
    if torch.is_grad_enabled() and True in [layer.requires_grad for layer in layers]:
        raise ValueError(
            "hidden: the LLM is frozen, so hidden must not require grad; detach it, or use "
            "sr_kernels.routing.reference.route, which differentiates through it"
        )
    return layers


def _check_alike(layers: list[Tensor]) -> None:
    """Refuse layers that differ from the first; 36 turns of a loop would cost more than a launch."""
    shape, dtype, device = layers[0].shape, layers[0].dtype, layers[0].device
    if not torch.compiler.is_compiling():  # one C++ call: a third of asking each in turn
        try:
            groups = torch._C._group_tensors_by_device_and_dtype([layers], False)  # type: ignore[list-item]
            if len(groups) == 1 and [layer.shape for layer in layers].count(shape) == len(layers):
                return
        except (AttributeError, RuntimeError, TypeError):
            pass  # not a tensor: named below
    for i, layer in enumerate(layers):
        checks.tensor(f"hidden[{i}]", layer, ndim=2)
        checks.same_device("hidden[0]", device, **{f"hidden[{i}]": layer})
        if layer.shape != shape or layer.dtype != dtype:
            wanted = f"shape {list(shape)} and {dtype} (those of hidden[0])"
            checks.fail(f"hidden[{i}]", wanted, f"{list(layer.shape)} and {layer.dtype}")


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


def _forward(
    weights: Tensor,
    hidden: list[Tensor],
    stats: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor | None,
    sumsq: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, squares, mean, rstd), by the op of `backend`; the statistics are taken where None."""
    ops = torch.ops.sr_kernels
    if backend == "native":
        if hidden[0].is_cuda:
            hopper.check(hidden, weights.shape[-2])
        if stats is None:
            return ops.native_route_fused(hidden, weights, cu_seqlens, sumsq)
        return *ops.native_route(hidden, weights, *stats, cu_seqlens, sumsq), *stats
    if stats is None:
        stats = ops.layer_stats(hidden, backend)
    return *ops.route(hidden, weights, *stats, cu_seqlens, sumsq, backend), *stats


class _Route(torch.autograd.Function):
    """Gradient to the weights only: hidden comes from a frozen LLM."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        hidden: list[Tensor],
        stats: tuple[Tensor, Tensor] | None,
        cu_seqlens: Tensor | None,
        sumsq: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        out, squares, mean, rstd = _forward(weights, hidden, stats, cu_seqlens, sumsq, backend)
        ctx.save_for_backward(mean, rstd, cu_seqlens if weights.ndim == 3 else None, out if sumsq else None, *hidden)
        ctx.backend = backend
        if not sumsq:
            ctx.mark_non_differentiable(squares)
        return out, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_squares: Tensor) -> tuple[Tensor | None, ...]:
        mean, rstd, cu_seqlens, out, *hidden = ctx.saved_tensors
        if ctx.backend == "native":
            squares = None if out is None else grad_squares
            d_weights = torch.ops.sr_kernels.native_route_backward(grad, hidden, mean, rstd, cu_seqlens, out, squares)
        else:
            grad = reference.with_squares(grad, out, grad_squares)
            d_weights = torch.ops.sr_kernels.route_backward(grad, hidden, mean, rstd, cu_seqlens, ctx.backend)
        return d_weights, None, None, None, None, None


def layer_stats(hidden: Tensor | Sequence[Tensor], *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """LayerNorm statistics over the channels, taken once per set of features.

    Args:
        hidden: [L, T, C], or a sequence of L tensors [T, C]; fp32, fp16, bf16 (or fp64).
        backend: "triton" (CUDA), "native" (CPU, Hopper) or "reference"; default by device.

    Returns: (mean, rstd), each [L, T], fp32 (fp64 for fp64 input), eps 1e-5 (eq. 2). The variance is the corrected
    two-pass form; `native` takes one pass over rows whose mean is within two deviations, to the same rounding.

    Raises: ValueError or TypeError naming the argument, from metadata alone.
    """
    layers = _check_hidden(hidden)
    chosen = backend_for(layers[0].device, backend, layers[0].dtype)
    if chosen == "native":
        return torch.ops.sr_kernels.native_layer_stats(layers)
    return torch.ops.sr_kernels.layer_stats(layers, chosen)


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
        backend: "triton" (CUDA), "native" (CPU, Hopper) or "reference"; default by device, or SR_KERNELS_BACKEND.

    Returns: out [D, T, C] in hidden's dtype; with return_sumsq (out, sumsq [D, T] fp32). Gradient to weights only, by
    autograd; torch.func's transforms (grad, vmap) do not go through it.

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
    device = layers[0].device
    checks.same_device("hidden", device, weights=weights, cu_seqlens=cu_seqlens)
    if stats is not None:
        if not isinstance(stats, (tuple, list)) or len(stats) != 2:
            got = f"{len(stats)} values" if isinstance(stats, (tuple, list)) else type(stats).__name__
            checks.fail("stats", "(mean, rstd)", got)
        fitting = (n_layers, tokens), wide, device
        for i, value in enumerate(stats):
            if not isinstance(value, Tensor) or (value.shape, value.dtype, value.device) != fitting:
                name = ("stats[0] (mean)", "stats[1] (rstd)")[i]
                checks.tensor(name, value, ndim=2, dtypes=(wide,))
                checks.same_device("hidden", device, **{name: value})
                checks.fail(name, f"shape [{n_layers}, {tokens}]", list(value.shape))
    chosen = backend_for(device, backend, layers[0].dtype)
    if weights.requires_grad and torch.is_grad_enabled():
        out, squares = _Route.apply(weights, layers, stats, cu_seqlens, return_sumsq, chosen)
    else:  # autograd would cost more than the checks
        out, squares, _, _ = _forward(weights, layers, stats, cu_seqlens, return_sumsq, chosen)
    return (out, squares) if return_sumsq else out
