"""Endless micro-batches of one rank, made ahead of the step, with a place that can be saved."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from streaming import StreamingDataLoader
from torch import Tensor

from train.config import ConfigError
from train.data.corpora import Part
from train.data.errors import DataError, plain
from train.data.memory import release
from train.data.samples import Pairs, collate

AHEAD = 2  # micro-batches made before they are asked for, where no loader process makes them
JOIN = 5.0  # seconds that closing waits for the thread that makes them
PR_SET_PDEATHSIG = 1
Batch = tuple[Tensor, list[tuple[str, ...]]]  # images or moments, and each sample's captions


def _outlive_signals(worker: int) -> None:
    """A signal to the whole process group is the trainer's to answer: it still needs its workers for a step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # not to wait for its siblings when the trainer is dead


@atexit.register  # runs before multiprocessing's own hook, which asks by SIGTERM and then waits for ever
def end_workers() -> None:
    """Kill this process's loader workers, deaf to SIGTERM as they are; they hold nothing worth keeping."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers:
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader takes the end of a worker for a fault
        for process in workers:
            process.kill()
        for process in workers:
            process.join()
        signal.signal(signal.SIGCHLD, before)


class TrainLoader:
    """Endless micro-batches of one rank, epoch after epoch, shuffled by seed and epoch; its place can be saved.

    parts, captions, moments: as of Pairs. micro_batch: samples of this rank in a forward pass. batch: samples of an
    optimiser step, over all ranks.

    Raises: DataError from iterating, wherever the data was read; ConfigError.
    """

    def __init__(
        self, parts: Sequence[Part], captions: Sequence[str], moments: tuple[int, int] | None, micro_batch: int,
        batch: int, workers: int, seed: int,
    ) -> None:  # fmt: skip
        self.dataset = Pairs(parts, captions, moments, micro_batch, batch, seed)
        if not sum(self.dataset.whole_batches()):
            raise ConfigError(
                f"batch_size: wanted at most the {max(part.index.samples for part in parts)} samples of "
                f"{parts[0].source}, got {batch}"
            )
        self.loader = StreamingDataLoader(
            self.dataset,
            batch_size=micro_batch,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=False,
            worker_init_fn=_outlive_signals,
        )
        self.workers = workers
        self._place: dict[str, Any] = {}
        self._closed = threading.Event()
        self._maker: threading.Thread | None = None
        self._running: Any = None

    def __iter__(self) -> Iterator[Batch]:
        self._running = self._passes() if self.workers else self._ahead()
        for batch, place in self._running:
            self._place = place  # of what was handed out, not of what was made
            yield batch

    def _passes(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Micro-batches, each with the place after it, epoch after epoch. Raises: DataError, ConfigError."""
        try:
            while True:
                for batch in self.loader:
                    yield batch, self.loader.state_dict() or {}
        except (DataError, ConfigError) as error:  # a loader process wraps them in its traceback
            raise type(error)(plain(error)) from error
        except (OSError, EOFError) as error:
            if not self.workers:
                raise
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would raise once more, anywhere
            raise DataError(  # it ended while it handed a batch over
                f"data.workers: DataLoader worker is gone: {plain(error)}; out of memory, or of shared memory?"
            ) from error

    def _ahead(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """`_passes`, run by a thread that is up to AHEAD micro-batches before its reader."""
        made: queue.Queue[Any] = queue.Queue(AHEAD)

        def put(item: Any) -> bool:
            while not self._closed.is_set():
                try:
                    made.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def make() -> None:
            try:
                for item in self._passes():
                    if not put(item):
                        return
            except BaseException as error:
                put(error)

        self._maker = threading.Thread(target=make, name="batches", daemon=True)
        self._maker.start()
        while True:
            item = made.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, to continue from."""
        return self._place

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved place; call before iterating."""
        if state:
            self._place = state
            self.loader.load_state_dict(state)

    def close(self) -> None:
        """End the workers, and free what the dataset shares with other processes."""
        self._closed.set()
        if self._running is not None:
            self._running.close()  # DataLoader ends its workers, and no longer takes their end for a fault
        end_workers()
        if self._maker is not None:
            self._maker.join(JOIN)  # it may be fetching a shard, or wait for another rank
            if self._maker.is_alive():
                return  # what it still reads is freed when the process ends
        release(self.dataset)
