"""From what the loader gives, images or a VAE's moments of them, to latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sr_model.codec import PixelCodec, VaeCodec
from train.config import ConfigError
from train.data.corpora import MOMENTS, Part

Codec = PixelCodec | VaeCodec


def moments_shape(parts: Sequence[Part], codec: Codec) -> tuple[int, int] | None:
    """(channels of the moments, the VAE's factor) where they are trained on: a VAE is given and all parts hold them.

    None where images are encoded.

    Raises: ConfigError when another VAE made them, or when some parts have no images and others no moments.
    """
    have = [MOMENTS in part.index.columns for part in parts]
    if isinstance(codec, VaeCodec) and all(have):
        mine = codec.fingerprint()
        for part in parts:
            if part.index.encoder != mine:
                made = "an unknown one" if part.index.encoder is None else f"{part.index.encoder[:12]}..."
                raise ConfigError(
                    f"data.vae: wanted the VAE that made the moments in {part.source} ({made}), got {mine[:12]}..."
                )
        return 2 * codec.channels, codec.factor
    for part in parts:
        if "image" not in part.index.columns:
            why = "the DiT works on pixels" if isinstance(codec, PixelCodec) else "other splits have no moments"
            raise ConfigError(f"data.path: wanted a column image in {part.source}, as {why}")
    return None


def latent_shape(codec: Codec, data: Tensor) -> tuple[int, int, int]:
    """(channels, H, W) of the latents of a batch as the loader gives it."""
    height, width = data.shape[2:]
    return codec.latent_shape(height, width) if data.dtype == torch.uint8 else (codec.channels, height, width)


def to_latents(codec: Codec, data: Tensor, noise: Tensor | None = None) -> Tensor:
    """Latents [n, channels, h, w] fp32 of uint8 images [n, 3, H, W] or fp16 moments [n, 2 channels, h, w].

    noise (of the latents' shape) draws from the posterior; None takes its mean.
    """
    if data.dtype == torch.uint8:
        return codec.encode(data.float() / 127.5 - 1, noise).float()
    assert isinstance(codec, VaeCodec)
    return codec.sample(data.float(), noise)
