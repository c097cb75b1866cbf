"""A prepared folder with one column more: read back with streaming, resumed, and its shards not trusted."""

import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstd
from streaming import MDSWriter, StreamingDataset

from train.prepare.rewrite import Added, BrokenShard, Outcome, read_index, read_shard, rewrite
from train.shapes.corpus import BadArgument

COLUMNS = {"image": "bytes", "caption": "str", "meta": "json", "weight": "ndarray:float32"}


def sample(split, i):
    rng = np.random.default_rng([len(split), i])
    weight = rng.standard_normal((2, i % 3 + 1)).astype(np.float32)
    return {
        "image": rng.bytes(400),
        "caption": f"{split} {i} é",
        "meta": {"key": i, "deep": [1, None]},
        "weight": weight,
    }


def write_split(folder, name, count, compression="zstd"):
    with MDSWriter(
        out=str(folder / name), columns=COLUMNS, compression=compression, hashes=["sha256"], size_limit=4000
    ) as writer:
        for i in range(count):
            writer.write(sample(name, i))


@pytest.fixture
def source(tmp_path):
    """30 samples in train and 5 in val, in zstd shards of a few samples, with files beside them."""
    folder = tmp_path / "source"
    write_split(folder, "train", 30)
    write_split(folder, "val", 5)
    (folder / "prompts.jsonl").write_text('{"caption": "x"}\n')
    (folder / "quarantine.jsonl").write_text('{"source": "a", "key": "b", "reason": "old", "detail": ""}\n')
    return folder


def lengths(calls=None, fail_at=None):
    """The column `length` of a sample's image; `calls` gets the places; raises at the `fail_at`-th call."""

    def compute(place, samples, tick):
        if calls is not None:
            calls.append(place)
            if len(calls) == fail_at:
                raise KeyboardInterrupt
        tick(len(samples))
        values = [len(s["image"]) + s["meta"]["key"] for s in samples]
        return Outcome(values, [(0, "first", "of its shard")], {"seen": len(samples)})

    return Added("length", "int", compute, metadata={"unit": "bytes"})


def read(folder):
    return list(StreamingDataset(local=str(folder), shuffle=False, batch_size=1))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("compression", "ending"), [("same", ".mds.zstd"), ("none", ".mds"), ("zstd", ".mds.zstd")])
def test_the_same_samples_in_the_same_order_with_one_column_more(source, tmp_path, compression, ending):
    out = tmp_path / "out"
    report = rewrite(source, out, lengths(), {"a": 1}, compression=compression, progress=False)
    shards = sum(len(read_index(source / name)["shards"]) for name in ("train", "val"))
    assert shards > 5
    assert (report["samples"], report["quarantined"], report["counts"]) == (35, {"first": shards}, {"seen": 35})
    assert json.loads((out / "length.json").read_text()) == report
    for name, count in (("train", 30), ("val", 5)):
        index = read_index(out / name)
        assert index["length"] == {"unit": "bytes"}
        assert all((out / name / f"shard.{i:05d}{ending}").is_file() for i in range(len(index["shards"])))
        found = read(out / name)
        assert len(found) == count
        for i, got in enumerate(found):
            wanted = sample(name, i)
            assert got.pop("length") == 400 + i
            np.testing.assert_array_equal(got.pop("weight"), wanted.pop("weight"))
            assert got == wanted
    assert (out / "prompts.jsonl").read_bytes() == (source / "prompts.jsonl").read_bytes()
    rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in rows] == ["old"] + ["first"] * shards
    assert rows[2] == {"source": "train/shard.00001.mds", "key": "0", "reason": "first", "detail": "of its shard"}
    assert not (out / ".rewrite").exists()


def test_aspect_buckets_and_a_dropped_column(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for name, count in (("train/64x32", 4), ("train/32x64", 3), ("val/64x32", 2)):
        write_split(source, name, count, None)
    added = lengths()
    rewrite(source, out, Added("length", "int", added.compute, drop="image"), {}, progress=False)
    for name, count in (("train/64x32", 4), ("train/32x64", 3), ("val/64x32", 2)):
        found = read(out / name)
        assert [s["length"] for s in found] == [400 + i for i in range(count)]
        assert set(found[0]) == {"caption", "meta", "weight", "length"}
    names = [json.loads((out / split / "buckets.json").read_text()) for split in ("train", "val")]
    assert names == [["32x64", "64x32"], ["64x32"]]


def test_an_interrupted_rewrite_continues_with_the_next_shard(source, tmp_path):
    whole, broken, calls = tmp_path / "whole", tmp_path / "broken", []
    rewrite(source, whole, lengths(), {"a": 1}, progress=False)
    with pytest.raises(KeyboardInterrupt):
        rewrite(source, broken, lengths(calls, fail_at=4), {"a": 1}, progress=False)
    (broken / ".rewrite" / "partial").mkdir()  # as a kill leaves it
    (broken / ".rewrite" / "partial" / "shard.00000.mds").write_bytes(b"half")
    rewrite(source, broken, lengths(calls), {"a": 1}, progress=False)
    assert calls.count("train/00003") == 2
    assert len(calls) == len(set(calls)) + 1
    assert contents(broken) == contents(whole)
    rewrite(
        source, broken, lengths(calls, fail_at=len(calls) + 1), {"a": 1}, progress=False
    )  # finished: computes nothing
    assert contents(broken) == contents(whole)


def test_another_command_is_refused(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        rewrite(source, out, lengths([], fail_at=2), {"a": 1}, progress=False)
    with pytest.raises(BadArgument, match=r"^a: .* was begun with 1, got 2"):
        rewrite(source, out, lengths(), {"a": 2}, progress=False)
    rewrite(source, out, lengths(), {"a": 1}, progress=False)
    with pytest.raises(BadArgument, match=r"^a: .* was begun with 1, got 2"):
        rewrite(source, out, lengths(), {"a": 2}, progress=False)
    with pytest.raises(BadArgument, match=r"^compression: .* was begun with same, got none"):
        rewrite(source, out, lengths(), {"a": 1}, compression="none", progress=False)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("")
    with pytest.raises(BadArgument, match=r"^out: wanted a new or empty folder"):
        rewrite(source, other, lengths(), {"a": 1}, progress=False)
    with pytest.raises(BadArgument, match=r"^out: wanted a folder outside"):
        rewrite(source, source / "in", lengths(), {"a": 1}, progress=False)
    with pytest.raises(BadArgument, match="'caption' not to be there"):
        rewrite(source, tmp_path / "x", Added("caption", "str", lengths().compute), {}, progress=False)
    with pytest.raises(BadArgument, match=r"^source: wanted a prepared folder with train/index.json"):
        rewrite(tmp_path / "nowhere", tmp_path / "x", lengths(), {}, progress=False)


def edit(folder, change):
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index["shards"][0])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("fault", ["flip", "cut", "gone", "raw hash"])
def test_a_broken_shard_is_named(source, tmp_path, fault):
    path = source / "train" / "shard.00001.mds.zstd"
    data = bytearray(path.read_bytes())
    if fault == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif fault == "cut":
        path.write_bytes(data[:-1])
    elif fault == "gone":
        path.unlink()
    else:
        raw = bytearray(zstd.decompress(bytes(data)))
        raw[-1] ^= 1
        path.write_bytes(zstd.compress(bytes(raw)))
        index = json.loads((source / "train" / "index.json").read_text())
        info = index["shards"][1]["zip_data"]
        info["bytes"], info["hashes"]["sha256"] = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        (source / "train" / "index.json").write_text(json.dumps(index))
    with pytest.raises(BrokenShard, match=r"shard\.00001\.mds\.zstd"):
        rewrite(source, tmp_path / "out", lengths(), {}, progress=False)
    assert not (tmp_path / "out" / "train" / "index.json").exists()


def test_a_zstd_bomb_is_refused_in_bounded_memory(source):
    folder = source / "train"
    path = folder / "shard.00000.mds.zstd"
    bomb = zstd.compress(bytes(1 << 28))
    path.write_bytes(bomb)
    edit(folder, lambda s: s["zip_data"].update(bytes=len(bomb), hashes={}))
    tracemalloc.start()
    import pyarrow

    before = pyarrow.default_memory_pool().max_memory()
    with pytest.raises(BrokenShard, match="unpacks to 268,435,456 bytes, wanted"):
        read_shard(folder, read_index(folder)["shards"][0])
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    assert pyarrow.default_memory_pool().max_memory() - before < 1 << 22
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["raw_data"].update(basename="../x.mds"), "wanted a file name inside the folder"),
        (lambda s: s["zip_data"].update(basename="/etc/passwd"), "wanted a file name inside the folder"),
        (lambda s: s["raw_data"].update(bytes=1 << 40), "raw_data.bytes: wanted a whole number from"),
        (lambda s: s.update(column_encodings=["pkl"] * 4), "column_encodings: wanted bytes, str"),
        (lambda s: s.update(format="json"), "format: wanted 'mds'"),
        (lambda s: s.pop("samples") and s.pop("column_names"), "wanted an object of"),
    ],
)
def test_an_index_that_cannot_be_trusted_is_refused(source, tmp_path, change, message):
    edit(source / "train", change)
    with pytest.raises(BrokenShard, match=message) as caught:
        rewrite(source, tmp_path / "out", lengths(), {}, progress=False)
    assert str(source / "train" / "index.json") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_folder_is_not_followed(source, tmp_path):
    path = source / "train" / "shard.00000.mds.zstd"
    shutil.move(path, tmp_path / path.name)
    Path(path).symlink_to(tmp_path / path.name)
    with pytest.raises(BrokenShard, match="link out of it"):
        rewrite(source, tmp_path / "out", lengths(), {}, progress=False)


def test_two_processes_do_not_write_the_same_folder(source, tmp_path):
    def compute(place, samples, tick):
        with pytest.raises(BadArgument, match="another process is writing"):
            rewrite(source, tmp_path / "out", lengths(), {}, progress=False)
        return Outcome([0] * len(samples))

    rewrite(source, tmp_path / "out", Added("length", "int", compute), {}, progress=False)
