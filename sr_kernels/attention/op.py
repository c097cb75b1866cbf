"""`varlen_attention`: checks and the choice of backend."""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sr_kernels import backends, checks
from sr_kernels.attention import reference, sdpa

VARIABLE = "SR_ATTENTION_BACKEND"
FLASH_DTYPES = (torch.float16, torch.bfloat16)


@cache
def _flash() -> tuple[Any, str | None]:
    """flash-attn's varlen function, version 3 before 2, and None; or None and the reason why there is none."""
    try:
        if importlib.util.find_spec("flash_attn_interface"):
            from flash_attn_interface import flash_attn_varlen_func
        elif importlib.util.find_spec("flash_attn"):
            from flash_attn import flash_attn_varlen_func
        else:
            return None, "flash-attn is not installed"
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        return None, f"flash-attn is installed but does not load: {error}"
    return flash_attn_varlen_func, None


@cache
def _torch_varlen() -> tuple[Any, bool]:
    """torch's varlen attention and whether it takes grouped queries itself (2.11 does not)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


@cache
def usable(device_type: str, dtype: torch.dtype) -> dict[str, str | None]:
    """Backends in order of preference, each with None or the reason why it cannot run."""
    gpu = None if device_type == "cuda" else "it needs a CUDA device"
    half = None if dtype in FLASH_DTYPES else f"it takes fp16 and bf16, not {dtype}"
    return {"flash": gpu or half or _flash()[1], "torch": gpu or half, "sdpa": None, "reference": None}


def backend_for(device: torch.device, dtype: torch.dtype, requested: str | None = None) -> str:
    """Name of the attention backend for `device` and `dtype`; see `sr_kernels.backends.choose` for the errors.

    The environment variable is read when a kind of device and dtype is first seen.
    """
    return _chosen(device.type, dtype, requested)


@torch.compiler.assume_constant_result  # a compiled graph keeps its backend
def _chosen(device: str, dtype: torch.dtype, requested: str | None) -> str:
    """As `backend_for`, once for each of its inputs."""
    asked = device, dtype, requested
    if asked not in _CHOSEN:
        _CHOSEN[asked] = backends.choose(requested, VARIABLE, usable(device, dtype), f"attention on {device}")
    return _CHOSEN[asked]


_CHOSEN: dict[tuple[str, torch.dtype, str | None], str] = {}


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
    backend: str | None = None,
) -> Tensor:
    """Grouped-query attention over packed sequences, scaled by hd^-0.5; differentiable in q, k, v.

    Args:
        q: [Tq, Hq, hd]; fp16 or bf16 for the GPU kernels, any float on the CPU.
        k, v: [Tk, Hkv, hd], Hq a multiple of Hkv.
        cu_seqlens_q, cu_seqlens_k: [B+1] int32, the sequences' bounds in Tq and Tk, on q's device.
        max_q, max_k: the longest sequence of either; host integers, so that nothing synchronises.
        causal: query i of n sees the keys up to i + nk - n; one that sees none gives 0.
        backend: "flash", "torch", "sdpa" or "reference"; default by device, or SR_ATTENTION_BACKEND.

    Returns: [Tq, Hq, hd] in q's dtype.

    Raises: ValueError or TypeError naming the argument. A sequence without keys is refused on the CPU; on a GPU, whose
    values are not read, it is refused where the bounds are made (sr_model.TextFeatures).
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, value, ndim=3)
    if k.shape != v.shape:
        checks.fail("v", f"k's shape {list(k.shape)}", f"shape {list(v.shape)}")
    if k.shape[-1] != q.shape[-1] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        checks.fail("k", f"head dim {q.shape[-1]} and a divisor of {q.shape[1]} heads", f"shape {list(k.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        checks.fail("k and v", f"q's dtype {q.dtype}", f"{k.dtype} and {v.dtype}")
    checks.same_device("q", q.device, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        checks.fail("cu_seqlens_k", f"{cu_seqlens_q.numel()} entries, as cu_seqlens_q", cu_seqlens_k.numel())
    checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], longest=("max_q", max_q))
    checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0], longest=("max_k", max_k), shortest=1)

    chosen = backend_for(q.device, q.dtype, backend)
    if chosen == "flash":
        return _flash()[0](q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal=causal)
    if chosen == "torch":
        varlen, grouped = _torch_varlen()
        options: dict[str, Any] = {"window_size": (-1, 0 if causal else -1)}
        if q.shape[1] != k.shape[1]:
            if grouped:
                options["enable_gqa"] = True
            else:
                group = q.shape[1] // k.shape[1]
                k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, **options)
    if chosen == "sdpa":
        return sdpa.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal=causal)
    return reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal)
