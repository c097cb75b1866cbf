"""Everything random in a training step, drawn per sample.

A sample's noise, time and prompt drop depend on (seed, step, its index in the global batch) alone: ranks and
micro-steps differ, and a resumed run, on any number of ranks, draws what the unbroken one would have drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """For n samples: noise [n, ...] fp32, posterior noise [n, ...] for a VAE, normal [n] for the time, uniform [n]."""

    noise: Tensor
    posterior: Tensor | None
    normal: Tensor
    uniform: Tensor

    def dropped(self, share: float) -> list[bool]:
        """Which samples lose their prompt."""
        return (self.uniform < share).tolist()


def draw(seed: int, step: int, indices: Sequence[int], shape: tuple[int, ...], posterior: bool = False) -> Draws:
    """Draws for the samples at `indices` of the global batch of `step`.

    shape: a latent's [channels, H, W]. posterior: also draw the VAE's noise, which changes none of the others.
    """
    size = int(np.prod(shape))
    rows = np.empty((len(indices), 2 + size * (2 if posterior else 1)), dtype=np.float32)
    for row, index in zip(rows, indices, strict=True):
        generator = np.random.Generator(np.random.Philox(key=[seed, (step << 32) | index]))
        row[0] = generator.random(dtype=np.float32)
        row[1:] = generator.standard_normal(row.size - 1, dtype=np.float32)
    values = torch.from_numpy(rows)
    noise = values[:, 2 : 2 + size].reshape(-1, *shape)
    extra = values[:, 2 + size :].reshape(-1, *shape) if posterior else None
    return Draws(noise, extra, values[:, 1], values[:, 0])
