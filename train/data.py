"""Image-caption pairs from MosaicML streaming shards.

Columns: `image` (an encoded PNG, JPEG or WebP file), `caption`, `meta`. Split folders: train/ and val/.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.shared import SharedArray, SharedBarrier, SharedMemory, SharedScalar
from torch import Tensor

from train.config import ConfigError


def decode(data: bytes, size: int) -> Tensor:
    """An encoded image to uint8 [3, size, size].

    Raises: ConfigError when its sides are not `size` (preparing resizes; training does not).
    """
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB"))
    if pixels.shape[:2] != (size, size):
        height, width = pixels.shape[:2]
        raise ConfigError(f"data.image_size: wanted {size}x{size} images, the shards hold {width}x{height}")
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


class Pairs(StreamingDataset):
    """A split's samples as {"image": uint8 [3, H, W], "caption": str}."""

    def __init__(self, folder: Path, image_size: int, **kwargs: Any) -> None:
        super().__init__(local=str(folder), **kwargs)
        self.image_size = image_size

    def __getitem__(self, at: Any) -> dict[str, Any]:
        sample = super().__getitem__(at)
        return {"image": decode(sample["image"], self.image_size), "caption": sample["caption"]}


def release(dataset: StreamingDataset) -> None:
    """Free the dataset's shared memory now; streaming itself keeps it, and its files, until the process ends."""
    pending = list(vars(dataset).values())
    while pending:
        value = pending.pop()
        if isinstance(value, SharedMemory):
            atexit.unregister(value.cleanup)
            value.cleanup()
        elif isinstance(value, SharedArray | SharedBarrier | SharedScalar):
            pending += vars(value).values()


def collate(samples: list[dict[str, Any]]) -> tuple[Tensor, list[str]]:
    """Samples to (uint8 [n, 3, H, W], captions)."""
    return torch.stack([s["image"] for s in samples]), [s["caption"] for s in samples]


def _outlive_signals(worker: int) -> None:
    """A signal to the whole process group is the trainer's to answer: it still needs its workers for a step."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # runs before multiprocessing's own hook, which asks by SIGTERM and then waits for ever
def end_workers() -> None:
    """Kill this process's loader workers, deaf to SIGTERM as they are; they hold nothing worth keeping."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class TrainLoader:
    """Endless micro-batches of one rank, epoch after epoch, shuffled by seed and epoch; its place can be saved."""

    def __init__(self, folder: Path, image_size: int, micro_batch: int, workers: int, seed: int) -> None:
        self.dataset = Pairs(
            folder, image_size, batch_size=micro_batch, shuffle=True, shuffle_seed=seed, num_canonical_nodes=1
        )
        self.loader = StreamingDataLoader(
            self.dataset,
            batch_size=micro_batch,
            num_workers=workers,
            collate_fn=collate,
            drop_last=True,
            persistent_workers=False,
            worker_init_fn=_outlive_signals,
        )

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        empty = 0
        while True:
            empty += 1
            for batch in self.loader:
                empty = 0
                yield batch
            if empty == 2:  # one empty pass is a run resumed at the very end of an epoch
                raise ConfigError(
                    f"batch_size: wanted at most the {self.dataset.num_samples} samples in the shards, over all ranks"
                )

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, to continue from."""
        return self.loader.state_dict() or {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved place; call before iterating."""
        if state:
            self.loader.load_state_dict(state)

    def close(self) -> None:
        """End the workers, and free what the dataset shares with other processes."""
        end_workers()
        release(self.dataset)


def read_split(folder: Path, image_size: int, count: int) -> tuple[Tensor, list[str]]:
    """The first `count` samples of a split, in the shards' order: (uint8 [n, 3, H, W], captions)."""
    dataset = Pairs(folder, image_size, batch_size=1)
    try:
        return collate([dataset[i] for i in range(min(count, dataset.num_samples))])
    finally:
        release(dataset)
