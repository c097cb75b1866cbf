"""A split as a StreamingDataset that reads verified shards, in an order that no number of ranks or workers changes."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from filelock import FileLock
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.world import World

from train.data.corpora import Part, sizes
from train.data.memory import Claim, one_job_at_a_time
from train.data.order import deal, epoch_order, one_size_a_batch
from train.data.shards import VerifiedStream


class Shards(StreamingDataset):
    """One split. Iterated, it is this rank's (or loader process's) part of an epoch; `self[i]` is any sample.

    Its indexes must have been checked (`open_data`). batch: samples of an optimiser step over all ranks; all of them
    come from parts of one size. Parts with proportions are drawn from as streaming does it: as many samples an epoch as
    all parts hold.

    Raises: DataError where a shard is missing, damaged or out of reach, from whatever read it.
    """

    def __init__(self, parts: Sequence[Part], micro_batch: int = 1, batch: int = 1, seed: int = 0) -> None:
        with one_job_at_a_time(leads=World.detect().is_local_leader):
            self._meet()
            super().__init__(
                streams=[VerifiedStream(part.source, part.proportion) for part in parts],
                batch_size=micro_batch,
                shuffle=True,
                shuffle_seed=seed,
                num_canonical_nodes=1,
                cache_limit=parts[0].source.cache_bytes,
            )
            self._meet()
        self.parts, self.batch, self.micro_batch = list(parts), batch, micro_batch
        self._place: dict[str, Any] | None = None
        if self._unique_rank_world.is_local_leader:  # nothing is trusted before it was compared with the index
            self._shard_states.numpy()[:] = _ShardState.REMOTE
        self.claim = Claim(self._shm_prefix_int, self._unique_rank_world.is_local_leader)
        self._meet()

    @staticmethod
    def _meet() -> None:
        """Wait for all ranks."""
        if dist.is_initialized():
            dist.barrier()

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """streaming's, which leaves a shard it failed on locked and "in preparation", for others to wait on."""
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            lock = self._cache_filelock
            with lock:
                self._shard_states[shard_id] = _ShardState.REMOTE
            while lock.is_locked:
                lock.release()
            raise

    def _evict_coldest_shard(self) -> None:
        """What an earlier run left in the cache and this one has not used goes first. The caller holds the lock."""
        for shard_id in np.flatnonzero(self._shard_states.numpy() == _ShardState.REMOTE):
            stream: Any = self.streams[self.stream_per_shard[shard_id]]
            if stream.held(self.shards[shard_id]):
                return self._evict_shard(int(shard_id))
        super()._evict_coldest_shard()

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """A sample's columns, its shard made ready if need be."""
        shard_id, _ = self.spanner[sample_id]
        while self._shard_states[shard_id] != _ShardState.LOCAL:
            self.prepare_shard(shard_id)
        return super().get_item(sample_id, retry)

    def streams_by_size(self) -> list[list[int]]:
        """The streams whose samples may share a batch."""
        return [[i for i, part in enumerate(self.parts) if part.size == size] for size in sizes(self.parts)]

    def whole_batches(self) -> list[int]:
        """Batches an epoch, for each of `streams_by_size`."""
        return [sum(int(self.streams[i].choose) for i in group) // self.batch for group in self.streams_by_size()]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The samples of an epoch, in order: streaming's own up- and down-sampling of every part, then shuffled."""
        orders = []
        for group in self.streams_by_size():
            drawn = [self.resample_streams(epoch, stream) for stream in group]
            units, ids = (np.concatenate(arrays) for arrays in zip(*drawn, strict=True))
            orders.append(ids[epoch_order(units, self.shuffle_seed, epoch)])
        return orders[0] if len(orders) == 1 else one_size_a_batch(orders, self.batch, self.shuffle_seed, epoch)

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        """This process's samples of the rest of an epoch. The order is made once a node and shared."""
        if not hasattr(self._shared_barrier, "lock"):
            self._shared_barrier.lock = FileLock(self._shared_barrier.filelock_path)
        world = self._unique_worker_world
        if world.is_local_leader:
            order = self._order(epoch)
            dealt = deal(
                order, sample_in_epoch, self.batch, world.num_ranks, self.micro_batch, world.workers_per_rank
            )  # [ranks, workers, batches, micro]
            shape_shm, data_shm = self._share_work(
                dealt.reshape(world.num_nodes, world.ranks_per_node, *dealt.shape[1:])
            )
            self._shared_barrier(world.workers_per_node)
        else:
            self._shared_barrier(world.workers_per_node)
            dealt, shape_shm, data_shm = self._attach_work()
            dealt = dealt.reshape(world.num_ranks, *dealt.shape[2:])
        mine = dealt[world.rank, world.worker_of_rank].flatten()
        self._shared_barrier(world.workers_per_node)
        for memory in (shape_shm, data_shm):
            if memory is not None:
                memory.cleanup()
        return mine[mine >= 0]

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Continue from a saved place; call before iterating.

        streaming's puts it into shared memory, which a rank that ends at once removes while another still looks for it.
        Loader processes are begun anew every epoch and get it with the dataset.
        """
        self._place = obj

    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        """The epoch to read, and the samples of it to leave out; `epoch` is the next one by streaming's count."""
        if self._place is None or self._place["epoch"] < epoch:
            return epoch, 0
        self.shuffle_seed = self._place["shuffle_seed"]
        self.initial_physical_nodes = self._place["initial_physical_nodes"]
        return self._place["epoch"], self._place["sample_in_epoch"]

    def __iter__(self) -> Iterator[Any]:
        """This process's samples of the next epoch, or of the rest of the one that was resumed.

        streaming's own ends early, or waits for ever, where a shard cannot be read; here the reader raises.
        """
        self._unique_worker_world = self._unique_rank_world.detect_workers()
        self._parallel_worker_world = self._unique_worker_world
        samples = self._get_work(*self._resume_incr_epoch())
        shard_of = np.searchsorted(self.samples_per_shard.cumsum(), samples, side="right")
        wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        threading.Thread(target=self._make_ready, args=(wanted,), name="shards", daemon=True).start()
        try:
            asked, ahead = set(), 0
            for at, sample in enumerate(samples):
                until = min(at + (self.predownload or 1), len(samples))
                for shard in dict.fromkeys(shard_of[ahead:until].tolist()):
                    if shard not in asked:
                        wanted.put(shard)
                        asked.add(shard)
                ahead = max(ahead, until)
                yield self[int(sample)]
        finally:
            wanted.put(None)

    def _make_ready(self, wanted: queue.SimpleQueue[int | None]) -> None:
        """Prepare shards before they are read; a failure is the reader's to meet."""
        while (shard := wanted.get()) is not None:
            if self._shard_states[shard] != _ShardState.LOCAL:
                with contextlib.suppress(Exception):
                    self.prepare_shard(shard, blocking=False)

    def file_of(self, sample_id: int) -> str:
        """The shard file that holds a sample, for messages."""
        shard_id, at = self.spanner[sample_id]
        folder = self.parts[self.stream_per_shard[shard_id]].source.folder
        return f"{folder / self.shards[shard_id].file_pairs[0][0].basename}, sample {at}"
