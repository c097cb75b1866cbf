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
    """For n samples: noise [n, ...] fp32, normal [n] for the time, posterior noise [n, ...] for the VAE, drop [n]."""

    noise: Tensor
    posterior: Tensor
    normal: Tensor
    uniform: Tensor

    def dropped(self, share: float) -> list[bool]:
        """Which samples lose their prompt."""
        return (self.uniform < share).tolist()


def draw(seed: int, step: int, indices: Sequence[int], shape: tuple[int, ...]) -> Draws:
    """Draws for the samples at `indices` of the global batch of `step`; `shape` is a latent's [channels, H, W]."""
    size = int(np.prod(shape))
    rows = np.empty((len(indices), 2 * size + 2), dtype=np.float32)
    for row, index in zip(rows, indices, strict=True):
        generator = np.random.Generator(np.random.Philox(key=[seed, (step << 32) | index]))
        row[-1] = generator.random(dtype=np.float32)
        row[:-1] = generator.standard_normal(2 * size + 1, dtype=np.float32)
    values = torch.from_numpy(rows)
    noise, posterior = values[:, :size], values[:, size : 2 * size]
    return Draws(noise.reshape(-1, *shape), posterior.reshape(-1, *shape), values[:, -2], values[:, -1])
