"""One order of samples, however many ranks, loader processes and micro-batches share it, and wherever it is resumed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train.data import Part, Source, TrainLoader, read_index
from train.data.memory import SHARED
from train.data.order import deal, epoch_order


def batches(dealt, world, micro, accumulate):
    """The global batches that ranks assemble: each rank takes its micro-batches from its workers in turn."""
    ranks, workers, rounds, _ = dealt.shape
    assert ranks == world
    mine = [
        [dealt[r, w, i] for i in range(rounds) for w in range(workers) if dealt[r, w, i, 0] >= 0] for r in range(world)
    ]
    assert len({len(m) for m in mine}) == 1
    for m in mine:
        assert all((part >= 0).all() and len(part) == micro for part in m)
    steps = len(mine[0]) // accumulate
    assert steps * accumulate == len(mine[0])
    for step in range(steps):
        parts = range(step * accumulate, (step + 1) * accumulate)
        # the k-th sample of a batch is rank k % world's, micro-step by micro-step
        yield [int(x) for part in parts for at in range(micro) for x in [mine[r][part][at] for r in range(world)]]


@given(
    samples=st.integers(1, 200),
    world=st.sampled_from([1, 2, 3, 4, 8]),
    micro=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    workers=st.integers(1, 4),
    done=st.integers(0, 12),
)
def test_any_share_gives_the_same_batches(samples, world, micro, accumulate, workers, done):
    order = np.random.default_rng(0).permutation(samples)
    batch = world * micro * accumulate
    start = min(done, samples // batch) * batch
    dealt = deal(order, start, batch, world, micro, workers)
    got = list(batches(dealt, world, micro, accumulate))
    wanted = [order[i : i + batch].tolist() for i in range(start, samples // batch * batch, batch)]
    assert got == wanted  # none lost, none twice, the remainder left out


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_holds_every_sample_once(sizes, seed, epoch):
    order = epoch_order(np.array(sizes), seed, epoch)
    assert sorted(order) == list(range(sum(sizes)))
    assert np.array_equal(order, epoch_order(np.array(sizes), seed, epoch))


def test_epochs_and_seeds_differ():
    orders = [epoch_order(np.array([30, 30]), seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (7, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def fingerprints(loader, count):
    """What tells the pictures of the next `count` micro-batches apart, and the place after them."""
    batches = iter(loader)
    seen = [tuple(int(image.long().sum()) for image in next(batches)[0]) for _ in range(count)]
    state = loader.state_dict()
    loader.close()
    return seen, state


def test_a_loader_resumes_where_its_reader_was(corpus):
    """40 samples, 3 micro-batches of 4 in a batch: 3 batches an epoch. What was made ahead is not lost."""

    def loader(workers):
        part = Part(Source(corpus / "train"), read_index(corpus / "train"), (32, 32), "corpus")
        return TrainLoader([part], ["caption"], None, 4, 12, workers, seed=5)

    whole, end = fingerprints(loader(0), 24)
    assert len({image for part in whole[:9] for image in part}) == 36
    assert set(whole[:9]) != set(whole[9:18])
    assert (end["epoch"], end["sample_in_epoch"]) == (2, 24)
    for count, workers in ((3, 0), (9, 2), (12, 2)):  # inside an epoch, at its end, in the next
        seen, state = fingerprints(loader(workers), count)
        rest = loader(2 - workers)
        rest.load_state_dict(state)
        assert rest.state_dict() == state
        shared = SHARED.glob(f"{rest.dataset._shm_prefix_int:06}_*")
        assert "resume" not in {path.name[7:] for path in shared}  # a rank that ends at once would take it from others
        assert seen + fingerprints(rest, 24 - count)[0] == whole
