"""The C++ CPU backend: csrc/routing_cpu.cpp, built on first use into torch's extension cache.

Its ops are registered beside the generic ones, so that a call reaches C++ with no Python between. `hopper.py` adds
the same ops for CUDA.
"""

from __future__ import annotations

import functools
import platform
import shutil
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from sr_kernels.routing import build

OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
FLAGS = ["-O3", "-march=native", "-Wno-psabi", *OPENMP]
HEADERS = ("routing_backward.h", "routing_forward.h", "rows.h", "simd.h")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LIBRARY = torch.library.Library("sr_kernels", "FRAGMENT")
LIBRARY.define("native_layer_stats(Tensor[] hidden) -> (Tensor, Tensor)")
LIBRARY.define(
    "native_route(Tensor[] hidden, Tensor weights, Tensor mean, Tensor rstd, Tensor? cu_seqlens, bool sumsq)"
    " -> (Tensor, Tensor)"
)
# the statistics taken in the same pass, and returned for the gradient
LIBRARY.define(
    "native_route_fused(Tensor[] hidden, Tensor weights, Tensor? cu_seqlens, bool sumsq)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
# out and grad_sumsq: the gradient that reached the sum of squares, added as the rows are read
LIBRARY.define(
    "native_route_backward(Tensor grad, Tensor[] hidden, Tensor mean, Tensor rstd, Tensor? cu_seqlens, Tensor? out,"
    " Tensor? grad_sumsq) -> Tensor"
)


def _stats_like(hidden: list[Tensor]) -> Tensor:
    layers = hidden[0].shape[0] if hidden[0].ndim == 3 else len(hidden)
    return hidden[0].new_empty(layers, hidden[0].shape[-2], dtype=torch.float32)


@torch.library.register_fake("sr_kernels::native_layer_stats")
def _layer_stats_fake(hidden: list[Tensor]) -> tuple[Tensor, Tensor]:
    return _stats_like(hidden), _stats_like(hidden)


@torch.library.register_fake("sr_kernels::native_route")
def _route_fake(
    hidden: list[Tensor], weights: Tensor, mean: Tensor, rstd: Tensor, cu_seqlens: Tensor | None, sumsq: bool
) -> tuple[Tensor, Tensor]:
    blocks, (tokens, channels) = weights.shape[-2], hidden[0].shape[-2:]
    return hidden[0].new_empty(blocks, tokens, channels), weights.new_empty((blocks, tokens) if sumsq else 0)


@torch.library.register_fake("sr_kernels::native_route_fused")
def _route_fused_fake(
    hidden: list[Tensor], weights: Tensor, cu_seqlens: Tensor | None, sumsq: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = _stats_like(hidden), _stats_like(hidden)
    return *_route_fake(hidden, weights, mean, rstd, cu_seqlens, sumsq), mean, rstd


@torch.library.register_fake("sr_kernels::native_route_backward")
def _route_backward_fake(
    grad: Tensor,
    hidden: list[Tensor],
    mean: Tensor,
    rstd: Tensor,
    cu_seqlens: Tensor | None,
    out: Tensor | None,
    grad_sumsq: Tensor | None,
) -> Tensor:
    batch = () if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    return mean.new_empty(*batch, grad.shape[0], mean.shape[0])


def _kind_of_cpu() -> str:
    """What -march=native depends on; a home folder may be shared."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    return next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])


def _check_compiler() -> None:
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler ({compiler!r} is not on the path)")


@functools.cache
def why_not() -> str | None:
    """None once the kernels are built and loaded, else the reason why they cannot run here. One try a process."""
    try:
        build.load(
            "CPU",
            ("routing_cpu.cpp",),
            HEADERS,
            _kind_of_cpu(),
            _check_compiler,
            extra_cflags=FLAGS,
            extra_ldflags=OPENMP,
        )
    except Exception as error:  # whatever is wrong with the toolchain, the reference still runs
        return (str(error).strip() or repr(error)).splitlines()[0]
    return None


@functools.cache
def why_not_with_warning() -> str | None:
    """As `why_not`; a reason is also warned of, once a process."""
    if reason := why_not():
        warnings.warn(f"no native CPU routing kernel, the slower reference runs: {reason}", stacklevel=2)
    return reason
