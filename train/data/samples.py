"""Samples out of shards: an image at the training resolution, or its moments, and its captions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.config import ConfigError
from train.data.corpora import MOMENTS, Part, Size
from train.data.dataset import Shards
from train.data.errors import DataError
from train.data.memory import release

Sample = tuple[Tensor, tuple[str, ...]]


def decode(data: bytes, size: Size) -> Tensor:
    """An encoded image to uint8 [3, H, W].

    Raises: ConfigError when its (width, height) is not `size` (preparing resizes; training does not); ValueError or
    OSError when it is no image.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.size != size:  # known before a pixel is decoded, however many there are
            raise ConfigError(
                f"data.image_size: wanted {size[0]}x{size[1]} images, the shards hold {image.size[0]}x{image.size[1]}"
            )
        pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


class Pairs(Shards):
    """A split's samples as (uint8 image [3, H, W] or fp16 moments [channels, h, w], its captions).

    captions: their columns. moments: (channels, pixels to a latent's pixel) to read the moments, None for the image.
    """

    def __init__(
        self, parts: Sequence[Part], captions: Sequence[str], moments: tuple[int, int] | None = None,
        micro_batch: int = 1, batch: int = 1, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(parts, micro_batch, batch, seed)
        self.captions, self.moments = tuple(captions), moments

    def __getitem__(self, at: Any) -> Sample:
        try:
            sample = super().__getitem__(at)
            size = self.parts[self.stream_per_shard[self.spanner[at][0]]].size
            data = decode(sample["image"], size) if self.moments is None else self._moments(sample[MOMENTS], size)
            return data, tuple(sample[column] for column in self.captions)
        except (DataError, ConfigError, IndexError):
            raise
        except Exception as error:  # whatever a decoder makes of bytes that are none of its own
            raise DataError(f"{self.file_of(at)} cannot be decoded: {type(error).__name__}: {error}") from error

    def _moments(self, values: np.ndarray, size: Size) -> Tensor:
        assert self.moments is not None
        channels, factor = self.moments
        if values.shape != (channels, size[1] // factor, size[0] // factor):
            raise ConfigError(
                f"data.image_size: wanted moments of {size[0]}x{size[1]} images, [{channels}, {size[1] // factor}, "
                f"{size[0] // factor}], the shards hold {list(values.shape)}"
            )
        return torch.from_numpy(values.copy())


def collate(samples: Sequence[Sample]) -> tuple[Tensor, list[tuple[str, ...]]]:
    """Samples to (images or moments [n, ...], captions)."""
    return torch.stack([data for data, _ in samples]), [captions for _, captions in samples]


def read_split(
    parts: Sequence[Part], captions: Sequence[str], moments: tuple[int, int] | None, count: int
) -> list[Sample]:
    """`count` samples of a split, or all: the first of every part, as many as its share; arguments as of Pairs.

    Raises: DataError, ConfigError.
    """
    dataset = Pairs(parts, captions, moments)
    try:
        count, total, end, taken = min(count, dataset.num_samples), dataset.num_samples, 0, []
        for part, first in zip(parts, dataset.sample_offset_per_stream.tolist(), strict=True):
            begin, end = end, end + part.index.samples
            share = count * end // total - count * begin // total
            taken += [dataset[first + i] for i in range(share)]
        return taken
    finally:
        release(dataset)
