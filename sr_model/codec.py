"""Latent codecs: images [B, 3, H, W] in [-1, 1] to the space the DiT works in, and back."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor


class PixelCodec:
    """The DiT works on pixels: both ways are the identity."""

    channels = 3
    factor = 1
    stochastic = False  # encoding takes no noise

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """images [B, 3, H, W] -> the same."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, 3, H, W] -> images, not clamped."""
        return latents

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, H, W) of an image's latent."""
        return self.channels, height, width


def latent_factor(settings: dict[str, Any]) -> int:
    """Pixels to a latent's pixel, along a side, from an AutoencoderKL's configuration."""
    return 2 ** (len(settings["block_out_channels"]) - 1)


class VaeCodec:
    """A diffusers AutoencoderKL, frozen: latents are (z - shift_factor) * scaling_factor (SD3: 16 channels, /8)."""

    stochastic = True  # encoding draws from the posterior

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.channels: int = vae.config.latent_channels
        self.factor = latent_factor(vae.config)
        self.shift = vae.config.shift_factor or 0.0
        self.scale = vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> [B, channels, H/factor, W/factor].

        noise (of the latents' shape) draws from the posterior; None takes its mean.
        """
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents -> images [B, 3, H, W], about [-1, 1], not clamped."""
        return self.vae.decode((latents / self.scale + self.shift).to(self.vae.dtype)).sample

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, H, W) of an image's latent.

        Raises: ValueError when a side is not a multiple of the VAE's factor.
        """
        if height % self.factor or width % self.factor:
            raise ValueError(f"height, width: wanted multiples of {self.factor}, got {height} and {width}")
        return self.channels, height // self.factor, width // self.factor


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float [B, 3, H, W] -> uint8, rounded and clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
