"""Caption columns, mixed corpora and aspect buckets: what a loader gives, and in which order."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from streaming import MDSWriter

from train.config import ConfigError, DataConfig
from train.data import TrainLoader, open_data, read_split
from train.data.order import one_size_a_batch


def write(folder, name, count, size=(8, 8), columns=("caption",), per_shard=16):
    """`count` samples whose captions are "NAME i COLUMN", a few to a shard."""
    with MDSWriter(
        out=str(folder), columns={"image": "bytes", **dict.fromkeys(columns, "str")}, hashes=["sha256"]
    ) as writer:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((size[1], size[0], 3), i % 256, np.uint8)).save(file, "PNG")
            writer.write({"image": file.getvalue(), **{column: f"{name} {i} {column}" for column in columns}})
            if i % per_shard == per_shard - 1 and i < count - 1:
                writer.flush_shard()
                writer._reset_cache()


@pytest.fixture
def loader(ranks_alone):
    """A function (data, batch, **rest) -> TrainLoader, closed at the end."""
    opened = []

    def make(data, batch, micro=None, seed=0):
        parts = open_data(data, ranks_alone)["train"]
        opened.append(TrainLoader(parts, list(data.captions), None, micro or batch, batch, 0, seed))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def epoch(loader, batches):
    running = iter(loader)
    return [next(running) for _ in range(batches)]


def test_all_caption_columns_come_with_a_sample(tmp_path, loader):
    for split in ("train", "val"):
        write(tmp_path / split, split, 8, columns=("caption", "recaption", "tags"))
    data = DataConfig(path=str(tmp_path), image_size=8, captions={"recaption": 0.8, "caption": 0.2})
    ((images, captions),) = epoch(loader(data, 8), 1)
    assert images.shape == (8, 3, 8, 8)
    assert sorted(captions) == [(f"train {i} recaption", f"train {i} caption") for i in range(8)]
    numbers = [int(pair[0].split()[1]) for pair in captions]
    assert images[:, 0, 0, 0].tolist() == numbers


def test_a_missing_caption_column_is_named_with_those_there_are(tmp_path, ranks_alone):
    for split in ("train", "val"):
        write(tmp_path / split, split, 2)
    data = DataConfig(path=str(tmp_path), image_size=8, captions={"recaption": 1.0})
    with pytest.raises(ConfigError, match=r"wanted a column 'recaption', got \['caption', 'image'\]"):
        open_data(data, ranks_alone)


def test_corpora_are_mixed_in_exact_proportion(tmp_path, loader):
    for name, count in (("a", 60), ("b", 20)):
        for split in ("train", "val"):
            write(tmp_path / name / split, name, count)
    mix = {str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 3.0}
    data = DataConfig(path=str(tmp_path / "a"), image_size=8, mix=mix)
    seen = Counter(
        caption for _, captions in epoch(loader(data, 8), 10) for (caption,) in captions
    )  # an epoch: 60 + 20
    assert sum(seen.values()) == 80
    a, b = ({key: n for key, n in seen.items() if key[0] == name} for name in "ab")
    assert (sum(a.values()), sum(b.values())) == (20, 60)  # 1 : 3 of 80
    assert set(a.values()) == {1}  # 20 different ones of 60
    assert b == {f"b {i} caption": 3 for i in range(20)}  # each three times


def test_every_batch_is_of_one_bucket_and_a_resumed_epoch_goes_on_the_same(tmp_path, loader):
    counts = {"8x16": 37, "16x8": 21, "8x8": 3}
    for split in ("train", "val"):
        for bucket, count in counts.items():
            write(tmp_path / split / bucket, bucket, count, tuple(map(int, bucket.split("x"))))
    data = DataConfig(path=str(tmp_path), image_size=8)
    whole = epoch(loader(data, 8, micro=4), 24)  # two epochs of (4 + 2 batches) x 2
    shapes = [(images.shape[3], images.shape[2]) for images, _ in whole]
    for at in range(0, 24, 2):
        assert shapes[at] == shapes[at + 1]  # the micro-batches of a batch
    for images, captions in whole:
        assert {c.split()[0] for (c,) in captions} == {f"{images.shape[3]}x{images.shape[2]}"}
    for half in (whole[:12], whole[12:]):
        seen = Counter(c for _, captions in half for (c,) in captions)
        assert set(seen.values()) == {1}
        assert Counter(c.split()[0] for c in seen) == {"8x16": 32, "16x8": 16}
    assert [c for _, c in whole[:12]] != [c for _, c in whole[12:]]

    first = loader(data, 8, micro=4)
    epoch(first, 6)
    place = first.state_dict()
    first.close()
    second = loader(data, 8, micro=4)
    second.load_state_dict(place)
    rest = epoch(second, 18)
    assert [c for _, c in rest] == [c for _, c in whole[6:]]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(rest, whole[6:], strict=True))


def test_validation_takes_from_every_bucket_its_share(tmp_path, ranks_alone):
    for split in ("train", "val"):
        for bucket, count in (("8x16", 30), ("16x8", 10)):
            write(tmp_path / split / bucket, bucket, count, tuple(map(int, bucket.split("x"))))
    parts = open_data(DataConfig(path=str(tmp_path), image_size=8), ranks_alone)["val"]
    names = [captions[0] for _, captions in read_split(parts, ["caption"], None, 8)]
    assert names == [f"8x16 {i} caption" for i in range(6)] + [f"16x8 {i} caption" for i in range(2)]
    assert len(read_split(parts, ["caption"], None, 99)) == 40


def test_a_bucket_that_is_not_of_its_size_is_named(tmp_path, loader):
    for split in ("train", "val"):
        write(tmp_path / split / "16x8", "x", 8, (8, 16))
    with pytest.raises(ConfigError, match="wanted 16x8 images, the shards hold 8x16"):
        epoch(loader(DataConfig(path=str(tmp_path), image_size=8), 4), 1)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_batches_of_one_order_each(counts, batch, seed, number):
    starts = np.cumsum([0, *counts])
    orders = [np.random.default_rng(0).permutation(n) + s for n, s in zip(counts, starts[:-1], strict=True)]
    mixed = one_size_a_batch(orders, batch, seed, number).reshape(-1, batch)
    groups = np.searchsorted(starts, mixed, side="right") - 1
    assert (groups == groups[:, :1]).all()
    for at, order in enumerate(orders):
        own = mixed[[bool(g[0] == at) for g in groups]]
        wanted = order[: len(order) // batch * batch].reshape(-1, batch)
        assert sorted(map(tuple, own)) == sorted(map(tuple, wanted))
