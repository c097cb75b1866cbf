"""The Hopper CUDA backend, `native` on CUDA: csrc/routing_hopper.cu, built on first use where nvcc is.

It makes the forward pass, statistics included. Statistics alone and the gradient are the Triton kernels'.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from sr_kernels import checks
from sr_kernels.routing import build, reference

DTYPES = (torch.bfloat16,)
CAPABILITY = (9, 0)
ARCHITECTURE = "-gencode=arch=compute_90a,code=sm_90a"
FLAGS = ["-O3", "-std=c++17", ARCHITECTURE]
COMPILED = ("routing_hopper.cu", "routing_hopper.cpp")
HEADERS = ("routing_hopper.h", "routing_hopper.cuh", "hopper_machine.cuh")

MAX_LAYERS, MAX_BLOCKS, CHANNELS = 48, 24, 128  # as in csrc/routing_hopper.h; channels come in multiples
ROW_BYTES = (232448 - 3200, 16)  # shared memory for one token's half rows, and what pads each of them


def check(layers: list[Tensor], blocks: int) -> None:
    """Raise a ValueError that names the argument for what the kernel cannot hold or read; C++ checks the addresses."""
    first = layers[0]
    n_layers, channels = len(layers) if first.ndim == 2 else first.shape[0], first.shape[-1]
    room, pad = ROW_BYTES
    if first.dtype not in DTYPES:
        checks.fail("hidden", "dtype bfloat16 with the native backend on CUDA", first.dtype)
    if n_layers > MAX_LAYERS:
        checks.fail("hidden", f"at most {MAX_LAYERS} layers with the native backend on CUDA", n_layers)
    if blocks > MAX_BLOCKS:
        checks.fail("weights", f"at most {MAX_BLOCKS} blocks with the native backend on CUDA", blocks)
    if channels % CHANNELS:
        checks.fail("hidden", f"a multiple of {CHANNELS} channels with the native backend on CUDA", channels)
    if n_layers * (channels + pad) > room:
        most = (room // n_layers - pad) // CHANNELS * CHANNELS
        checks.fail("hidden", f"at most {most} channels of {n_layers} layers with the native backend on CUDA", channels)
    stride = first.stride(-2)
    for i, layer in enumerate(layers):
        if layer.stride(-2) != stride:
            checks.fail(f"hidden[{i}]", f"row stride {stride} (that of hidden[0])", layer.stride(-2))
    if stride % 8 or (first.ndim == 3 and first.stride(0) % 8):
        checks.fail("hidden", "strides of multiples of 8 with the native backend on CUDA", first.stride())


def _check_compiler() -> None:
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    if home is None or not os.access(Path(home) / "bin" / "nvcc", os.X_OK):
        raise RuntimeError("no CUDA compiler (nvcc is neither on the path nor in CUDA_HOME)")
    if not (Path(home) / "include" / "cuda_runtime.h").exists():  # torch takes the folder above nvcc's for it
        raise RuntimeError(f"no cuda_runtime.h in {home}/include: set CUDA_HOME to the CUDA toolkit's folder")


def load() -> None:
    """Load the kernel's ops, and build them first if this machine has not yet; needs no GPU."""
    build.load("Hopper", COMPILED, HEADERS, "", _check_compiler, extra_cuda_cflags=FLAGS, extra_cflags=["-O3"])


@functools.cache
def why_not() -> str | None:
    """None once the kernel is built and loaded, else the reason why it cannot run here. One try a process."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if (capability := torch.cuda.get_device_capability()) != CAPABILITY:
        return f"it is for Hopper (sm_90), not sm_{capability[0]}{capability[1]}"
    try:
        load()
    except Exception as error:  # whatever is wrong with the toolchain, other backends still run
        return (str(error).strip() or repr(error)).splitlines()[0]
    return None


@torch.library.impl("sr_kernels::native_layer_stats", "cuda")
def _layer_stats(hidden: list[Tensor]) -> tuple[Tensor, Tensor]:
    from sr_kernels.routing import launch

    return launch.layer_stats(hidden)


@torch.library.impl("sr_kernels::native_route_backward", "cuda")
def _route_backward(
    grad: Tensor,
    hidden: list[Tensor],
    mean: Tensor,
    rstd: Tensor,
    cu_seqlens: Tensor | None,
    out: Tensor | None,
    grad_sumsq: Tensor | None,
) -> Tensor:
    from sr_kernels.routing import launch

    return launch.route_backward(reference.with_squares(grad, out, grad_sumsq), hidden, mean, rstd, cu_seqlens)
