"""Flow matching in the paper's time: t = 0 is noise, t = 1 is data, x_t = (1 - t) noise + t data (eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of data, noise [B, ...] at t [B] (or [1])."""
    t = _per_sample(t, data)
    return (1 - t) * noise + t * data


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """dx/dt along the straight path, the network's target: data - noise."""
    return data - noise


def sigma_of(t: Tensor) -> Tensor:
    """The scheduler's noise level of a flow time, and the reverse: sigma = 1 - t. The one place of this conversion."""
    return 1 - t


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """SD3's timestep shift: sigma' = s sigma / (1 + (s - 1) sigma); s > 1 spends more steps near the noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def logit_normal_times(normal: Tensor, shift: float, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training times t in (0, 1) from normal draws [B]: sigma = sigmoid(mean + std n), then the shift."""
    return sigma_of(shift_sigma(torch.sigmoid(mean + std * normal), shift))
