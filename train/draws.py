"""Everything random in a training step, drawn per sample.

A sample's noise, time, caption and prompt drop depend on (seed, step, its index in the global batch) alone: ranks and
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
    """For n samples: noise [n, ...] fp32, posterior noise [n, ...] for a VAE, normal [n] for the time, uniform [n].

    choice: uniform [n] float64, which of several captions.
    """

    noise: Tensor
    posterior: Tensor | None
    normal: Tensor
    uniform: Tensor
    choice: Tensor

    def dropped(self, share: float) -> list[bool]:
        """Which samples lose their prompt."""
        return (self.uniform < share).tolist()

    def captions(self, columns: Sequence[Sequence[str]], weights: Sequence[float]) -> list[str]:
        """One caption a sample. columns: each sample's captions, as many as there are weights."""
        edges = np.cumsum(weights)
        chosen = np.searchsorted(edges[:-1], self.choice.numpy() * edges[-1], side="right")
        return [captions[at] for captions, at in zip(columns, chosen.tolist(), strict=True)]


def draw(seed: int, step: int, indices: Sequence[int], shape: tuple[int, ...], posterior: bool = False) -> Draws:
    """Draws for the samples at `indices` of the global batch of `step`.

    shape: a latent's [channels, H, W]. posterior: also draw the VAE's noise, which changes none of the others.
    """
    size = int(np.prod(shape))
    rows = np.empty((len(indices), 2 + size * (2 if posterior else 1)), dtype=np.float32)
    choice = np.empty(len(indices))
    for at, (row, index) in enumerate(zip(rows, indices, strict=True)):
        key = [seed, (step << 32) | index]
        generator = np.random.Generator(np.random.Philox(key=key))
        row[0] = generator.random(dtype=np.float32)
        row[1:] = generator.standard_normal(row.size - 1, dtype=np.float32)
        # A stream of its own, 2^192 numbers on, so that it moves none of the others.
        choice[at] = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1])).random()
    values = torch.from_numpy(rows)
    noise = values[:, 2 : 2 + size].reshape(-1, *shape)
    extra = values[:, 2 + size :].reshape(-1, *shape) if posterior else None
    return Draws(noise, extra, values[:, 1], values[:, 0], torch.from_numpy(choice))
