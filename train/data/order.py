"""Which sample goes where: one order of an epoch, dealt to ranks in turn, whatever their number.

An epoch has as many optimiser steps as its samples fill. What is left over, fewer samples than a batch, is another part
of the split in every epoch, as each is shuffled anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from streaming.base.shuffle import get_shuffle


def epoch_order(samples_per_shard: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """All samples in the order of an epoch, int64 [n]: shards in random order, samples mixed over 2^18 to 2^22."""
    block = max(4_000_000, 1 << 18)
    return get_shuffle("py1e", samples_per_shard, 1, seed, epoch, block)


def one_size_a_batch(orders: Sequence[NDArray[np.int64]], batch: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Several orders into one, int64 [n]: each batch of samples comes from one of them, the batches in random order.

    What is left over of each order is left out, as at the end of an epoch.
    """
    whole = [order[: len(order) // batch * batch].reshape(-1, batch) for order in orders]
    return np.random.default_rng([seed, epoch]).permutation(np.concatenate(whole)).flatten()


def deal(order: NDArray[np.int64], start: int, batch: int, world: int, micro: int, workers: int) -> NDArray[np.int64]:
    """The rest of an epoch from its sample `start` on, in whole batches: int64 [world, workers, batches, micro].

    The k-th sample of a batch goes to rank k % world; a rank's micro-batches go to its workers in turn, as DataLoader
    asks them. -1 stands where there are not as many micro-batches for each worker.

    batch: samples of an optimiser step, a multiple of world * micro.
    """
    rest = order[start:]
    rest = rest[: len(rest) // batch * batch]
    count = len(rest) // (world * micro)  # of each rank's micro-batches
    mine = rest.reshape(count * micro, world).T.reshape(world, count, micro)
    mine = np.concatenate([mine, np.full((world, -count % workers, micro), -1, np.int64)], 1)
    return mine.reshape(world, mine.shape[1] // workers, workers, micro).transpose(0, 2, 1, 3)
