"""Latent codecs: images [B, 3, H, W] in [-1, 1] to the space the DiT works in, and back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
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


def vae_settings(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Configuration of a diffusers AutoencoderKL (its own folder, or a pipeline's `vae`), and where it lies there.

    name: a Hugging Face name or a folder. Raises: OSError when there is none.
    """
    where = {} if (Path(name) / "config.json").is_file() else {"subfolder": "vae"}
    return AutoencoderKL.load_config(name, **where), where


class VaeCodec:
    """A diffusers AutoencoderKL, frozen: latents are (z - shift_factor) * scaling_factor (SD3: 16 channels, /8)."""

    stochastic = True  # encoding draws from the posterior

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.channels: int = vae.config.latent_channels
        self.factor = latent_factor(vae.config)
        self.shift = vae.config.shift_factor or 0.0
        self.scale = vae.config.scaling_factor

    @classmethod
    def from_pretrained(cls, name: str, device: torch.device | str, dtype: torch.dtype) -> VaeCodec:
        """The VAE `vae_settings` finds, with its weights. Raises: OSError when there is none."""
        _, where = vae_settings(name)
        return cls(AutoencoderKL.from_pretrained(name, torch_dtype=dtype, **where).to(device))

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> the posterior [B, 2 channels, H/factor, W/factor]: mean, log-variance."""
        return self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """`moments` -> latents [B, channels, h, w], in their dtype; noise (of that shape) or None: as `encode`."""
        posterior = DiagonalGaussianDistribution(moments)
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        return (z - self.shift) * self.scale

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> [B, channels, H/factor, W/factor].

        noise (of the latents' shape) draws from the posterior; None takes its mean.
        """
        return self.sample(self.moments(images), noise)

    def fingerprint(self) -> str:
        """SHA-256 of what `moments` depends on: the encoder's weights, rounded to bf16, and its settings.

        The same in whatever dtype the VAE was loaded; a decoder of one's own does not change it.
        """
        c = self.vae.config
        settings = (list(c.block_out_channels), c.layers_per_block, c.act_fn, c.norm_num_groups, c.latent_channels)
        digest = hashlib.sha256(repr(settings).encode())
        for name, value in sorted(self.vae.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.")):
                digest.update(f"{name} {tuple(value.shape)}".encode())
                digest.update(value.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().data)
        return digest.hexdigest()

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
