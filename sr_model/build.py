"""A transformer by the names of its strategy and its size."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from sr_model.dit import DiT
from sr_model.fusedit import FuseDiT
from sr_model.fusion import STRATEGIES
from sr_model.presets import PRESETS


def build(
    strategy: str,
    preset: str = "paper",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> DiT | FuseDiT:
    """A DiT of a named size, or a FuseDiT; `overrides` replace single sizes. device="meta" allocates nothing.

    Raises: ValueError for an unknown strategy or preset, TypeError for an unknown size.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: wanted one of {', '.join(PRESETS)}, got {preset!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: wanted one of {', '.join(STRATEGIES)}, got {strategy!r}")
    sizes = dict(PRESETS[preset])
    with torch.device(device or "cpu"):
        if strategy == "fusedit":
            sizes.pop("rope_base", None)  # the LLM's own
            kept = {k: v for k, v in {**sizes, **overrides}.items() if k != "text_dim"}  # it projects no text
            model: DiT | FuseDiT = FuseDiT(strategy=strategy, **kept)
        else:
            model = DiT(strategy=strategy, **{**sizes, **overrides})
    return model if dtype is None else nn.Module.to(model, dtype=dtype)  # ModelMixin.to warns without a reason


def parameter_count(model: nn.Module) -> int:
    """Number of parameters (the whole model's, also when ZeRO-3 has partitioned them)."""
    return sum(getattr(p, "ds_numel", None) or math.prod(p.shape) for p in model.parameters())
