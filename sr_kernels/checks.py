"""Metadata checks shared by the ops. They read shapes, dtypes and devices only, so they never synchronise a GPU."""

from __future__ import annotations

import itertools

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fail(argument: str, wanted: str, got: object) -> None:
    """Raise a ValueError that names the argument, what is wanted and what came."""
    raise ValueError(f"{argument}: wanted {wanted}, got {got}")


def tensor(argument: str, value: object, *, ndim: int, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Check that `value` is a tensor of rank `ndim` with one of `dtypes`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{argument}: wanted a tensor, got {type(value).__name__}")
    if value.ndim != ndim:
        fail(argument, f"{ndim} dimensions", f"shape {list(value.shape)}")
    if value.dtype not in dtypes:
        fail(argument, "dtype " + " or ".join(str(d).removeprefix("torch.") for d in dtypes), value.dtype)


def same_device(reference: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    """Check that every tensor given by name lies on `device`."""
    for name, value in tensors.items():
        if value is not None and value.device != device:
            fail(name, f"device {device} (that of {reference})", value.device)


def cu_seqlens(
    argument: str, value: torch.Tensor, total: int, *, longest: tuple[str, int] | None = None, shortest: int = 0
) -> None:
    """Check a cumulative-length vector [B+1], int32. The values themselves are read on the CPU only.

    longest: the argument that states the longest sequence, and its value. shortest: tokens a sequence must have.

    Raises: ValueError when it does not start at 0, decreases, does not end at `total`, or breaks one of the limits.
    """
    tensor(argument, value, ndim=1, dtypes=(torch.int32,))
    if value.numel() < 2:
        fail(argument, "at least 2 entries (one sequence)", f"{value.numel()}")
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = value.tolist()
    if values[0] != 0 or values[-1] != total:
        fail(argument, f"to run from 0 to {total}", f"{values[0]} to {values[-1]}")
    lengths = [b - a for a, b in itertools.pairwise(values)]
    if min(lengths) < 0:
        fail(argument, "non-decreasing values", values)
    if min(lengths) < shortest:
        fail(
            argument,
            f"at least {shortest} in every sequence",
            f"{min(lengths)} in sequence {lengths.index(min(lengths))}",
        )
    if longest is not None and longest[1] < max(lengths):
        fail(longest[0], f"at least {max(lengths)}, the longest sequence", longest[1])
