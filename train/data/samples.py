"""Samples out of shards: an image at the training resolution and its caption."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.config import ConfigError
from train.data.dataset import Shards
from train.data.errors import DataError
from train.data.memory import release
from train.data.source import Source


def decode(data: bytes, size: int) -> Tensor:
    """An encoded image to uint8 [3, size, size].

    Raises: ConfigError when its sides are not `size` (preparing resizes; training does not); ValueError or OSError
    when it is no image.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.size != (size, size):  # known before a pixel is decoded, however many there are
            raise ConfigError(
                f"data.image_size: wanted {size}x{size} images, the shards hold {image.size[0]}x{image.size[1]}"
            )
        pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


class Pairs(Shards):
    """A split's samples as {"image": uint8 [3, H, W], "caption": str}."""

    def __init__(self, source: Source, image_size: int, micro_batch: int = 1, batch: int = 1, seed: int = 0) -> None:
        super().__init__(source, micro_batch, batch, seed)
        self.image_size = image_size

    def __getitem__(self, at: Any) -> dict[str, Any]:
        try:
            sample = super().__getitem__(at)
            return {"image": decode(sample["image"], self.image_size), "caption": sample["caption"]}
        except (DataError, ConfigError, IndexError):
            raise
        except Exception as error:  # whatever a decoder makes of bytes that are none of its own
            raise DataError(f"{self.file_of(at)} cannot be decoded: {type(error).__name__}: {error}") from error


def collate(samples: list[dict[str, Any]]) -> tuple[Tensor, list[str]]:
    """Samples to (uint8 [n, 3, H, W], captions)."""
    return torch.stack([s["image"] for s in samples]), [s["caption"] for s in samples]


def read_split(source: Source, image_size: int, count: int) -> tuple[Tensor, list[str]]:
    """The first `count` samples of a split, in the shards' order: (uint8 [n, 3, H, W], captions).

    Raises: DataError, ConfigError.
    """
    dataset = Pairs(source, image_size)
    try:
        return collate([dataset[i] for i in range(min(count, dataset.num_samples))])
    finally:
        release(dataset)
