"""Shards are compared with the index; what a folder lacks comes from where it was, whole."""

import bz2
import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
import zstd
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st
from streaming import MDSWriter
from streaming.base.world import World

from train.config import ConfigError, DataConfig
from train.data import DataError, Part, Source, TrainLoader, open_data, read_index, read_split, split
from train.data.errors import lost_worker, plain
from train.data.memory import SHARED, claims, clean_stale, one_job_at_a_time
from train.data.shards import VerifiedStream, fault, undo, zstd_frame
from train.data.source import not_there


def loader_of(folder, side=32, batch=4, workers=0):
    """Micro-batches of 4 from one folder of shards."""
    part = Part(Source(folder), read_index(folder), (side, side), str(folder))
    return TrainLoader([part], ["caption"], None, 4, batch, workers, 0)


@given(st.binary(max_size=3000), st.integers(0, 40), st.sampled_from([1, 3, 19]))
def test_every_compression_is_undone(data, times, level):
    data = data * (1 + times)
    for packed, kind in (
        (zstd.compress(data, level), "zstd"),
        (bz2.compress(data), "bz2:9"),
        (gzip.compress(data), "gz"),
    ):
        if data:
            assert undo(packed, kind, len(data)) == data
            for size in (len(data) - 1, len(data) + 1):
                with pytest.raises(ValueError, match="unpacks to"):
                    undo(packed, kind, size)


@given(st.binary(min_size=1, max_size=3000), st.data())
def test_a_zstd_file_is_one_frame(data, draw):
    packed = zstd.compress(data)
    assert zstd_frame(packed) == len(data)
    cut = draw.draw(st.integers(0, len(packed) - 1))
    for bad in (packed[:cut], packed + packed, packed + b"x", b"PK" + packed):
        with pytest.raises(ValueError, match="frame"):
            zstd_frame(bad)


@pytest.mark.parametrize(("kind", "pack"), [("zstd", zstd.compress), ("bz2", bz2.compress), ("gz", gzip.compress)])
def test_a_bomb_takes_no_memory(kind, pack):
    bomb = pack(bytes(1 << 26))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="unpacks to"):
            undo(bomb, kind, 1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 21
    finally:
        tracemalloc.stop()


def test_a_folder_elsewhere_is_copied_and_mended(corpus, tmp_path, ranks_alone):
    data = DataConfig(path=str(corpus), cache=str(tmp_path), image_size=32)
    parts = open_data(data, ranks_alone)["train"]
    assert parts[0].index.samples == 40
    train = split(data, "train")
    assert train.folder.is_relative_to(tmp_path)
    samples = read_split(parts, ["caption"], None, 5)
    (shard,) = train.folder.glob("shard*")
    good = shard.read_bytes()
    for damage in (good[:-1], bytes([good[0] ^ 1]) + good[1:], None):
        shard.write_bytes(damage) if damage else shard.unlink()
        again = read_split(parts, ["caption"], None, 5)
        assert all((a == b).all() and c == d for (a, c), (b, d) in zip(again, samples, strict=True))
        assert shard.read_bytes() == good
    assert sorted(p.name for p in train.folder.iterdir()) == ["index.json", shard.name]


def test_two_runs_share_a_cache(tmp_path):
    """One takes a shard while the other is between fetching and unpacking it; what a third one fetches stays."""
    there, cache = tmp_path / "there", tmp_path / "cache"
    with MDSWriter(out=str(there), columns={"n": "int"}, compression="zstd", hashes=["sha256"], size_limit=64) as out:
        for n in range(40):
            out.write({"n": n})
    one, other = (VerifiedStream(Source(cache, str(there))) for _ in range(2))
    for stream in (one, other):  # as a dataset does
        stream.apply_default({"split": None, "download_retry": 2, "validate_hash": None, "keep_zip": False})
    shards = one.get_shards(World.detect(), False)
    unpack, turns = one._unpack, []

    def slow(*arguments):
        turns.append(other.prepare_shard(shards[len(turns)]))
        unpack(*arguments)

    one._unpack = slow
    for shard in shards:
        one.prepare_shard(shard)
    assert len(turns) == len(shards) > 1
    names = {"index.json"} | {shard.file_pairs[0][0].basename for shard in shards}
    assert {path.name for path in cache.iterdir()} == names
    assert all(fault(cache / shard.file_pairs[0][0].basename, shard.file_pairs[0][0]) is None for shard in shards)
    new, old = cache / "a.mds.part-another-7-ff", cache / "b.mds.part-another-8-ee"
    for path in (new, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    one.set_up_local(shards, [0] * len(shards))
    assert {path.name for path in cache.iterdir()} == names | {new.name}


@pytest.mark.parametrize(("code", "gone"), [("404", True), ("NoSuchKey", True), ("503", False), ("SlowDown", False)])
def test_a_store_that_is_busy_is_not_one_without_the_file(code, gone):
    error = DataError("s3://a/b")
    error.__cause__ = ClientError({"Error": {"Code": code}}, "GetObject")
    assert not_there(error) == gone
    error.__cause__ = FileNotFoundError()
    assert not_there(error)
    error.__cause__ = TimeoutError()
    assert not not_there(error)


def test_an_older_index_in_the_cache_is_not_used(corpus, tmp_path, ranks_alone):
    own = tmp_path / "own"
    shutil.copytree(corpus, own)
    data = DataConfig(path=str(own), cache=str(tmp_path / "cache"))
    open_data(data, ranks_alone)
    index = json.loads((own / "train" / "index.json").read_text())
    index["shards"][0]["samples"] = 39
    (own / "train" / "index.json").write_text(json.dumps(index))
    assert open_data(data, ranks_alone)["train"][0].index.samples == 39


def test_a_cache_too_small_is_refused(corpus, tmp_path, ranks_alone):
    data = DataConfig(path=str(corpus), cache=str(tmp_path), cache_gb=1e-7)
    with pytest.raises(ConfigError, match=r"data.cache_gb: wanted room for four of the largest shards, .* got 1e-07"):
        open_data(data, ranks_alone)


def test_no_index_where_there_should_be_one(tmp_path, ranks_alone):
    for data in (DataConfig(path=str(tmp_path)), DataConfig(path=str(tmp_path), cache=str(tmp_path / "cache"))):
        with pytest.raises(ConfigError, match=r"data.path: .*train/index.json"):
            open_data(data, ranks_alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_named(corpus, tmp_path, workers):
    """Its hash is right: it was written so."""
    import hashlib

    shutil.copytree(corpus / "train", tmp_path / "train")
    (shard,) = (tmp_path / "train").glob("shard*")
    shard.write_bytes(shard.read_bytes().replace(b"IHDR", b"IHDX"))
    path = tmp_path / "train" / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0]["raw_data"]["hashes"]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    path.write_text(json.dumps(index))
    loader = loader_of(tmp_path / "train", workers=workers)
    with pytest.raises(DataError, match=rf"^{shard}, sample \d+ cannot be decoded: ") as caught:
        next(iter(loader))
    assert "\n" not in str(caught.value)
    loader.close()


def test_the_size_of_images_is_named(corpus):
    for workers in (0, 2):
        loader = loader_of(corpus / "train", side=64, workers=workers)
        with pytest.raises(ConfigError, match=r"^data.image_size: wanted 64x64 images, the shards hold 32x32$"):
            next(iter(loader))
        loader.close()


def test_a_batch_larger_than_the_split_is_refused(corpus):
    with pytest.raises(ConfigError, match=r"batch_size: wanted at most the 40 samples of .*train, got 41"):
        loader_of(corpus / "train", batch=41)


def test_a_loader_leaves_nothing_in_shared_memory(corpus):
    before = set(SHARED.iterdir()) | set(claims().glob("[0-9]*"))
    loader = loader_of(corpus / "train", batch=8)
    next(iter(loader))
    loader.close()
    prefix = f"{loader.dataset._shm_prefix_int:06}"
    left = set(SHARED.iterdir()) | set(claims().glob("[0-9]*"))
    assert not [path for path in left - before if path.name.startswith(prefix)]


HOLD = """
import sys, time
from pathlib import Path
from tests.train.data.test_data_shards import loader_of
loader = loader_of(Path(sys.argv[1]), batch=8)
next(iter(loader))
print(loader.dataset._shm_prefix_int, flush=True)
time.sleep(600)
"""


def test_jobs_take_numbers_one_after_the_other():
    entered = []

    def job():
        with one_job_at_a_time(leads=True):
            entered.append("second")

    second = threading.Thread(target=job)
    with one_job_at_a_time(leads=True):
        second.start()
        with one_job_at_a_time(leads=False), one_job_at_a_time(leads=True, patience=0):
            entered.append("first")  # other ranks of the job, and who has waited long enough, are not held up
    second.join()
    assert entered == ["first", "second"]


def interrupted_after(count, unlink, prefix):
    """`unlink`, which Ctrl-C interrupts after so many files whose names begin with `prefix`."""
    done = []

    def interrupted(path, missing_ok=False):
        if path.name.startswith(prefix):
            done.append(path)
            if len(done) > count:
                raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    return interrupted


def test_only_what_a_dead_process_left_is_cleaned(corpus):
    command = [sys.executable, "-c", HOLD, str(corpus / "train")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)]
    try:
        first = int(processes[0].stdout.readline())
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        second = int(processes[1].stdout.readline())
        names = {p: {path.name for path in SHARED.glob(f"{p:06}_*")} for p in (first, second)}
        assert len(names[first]) >= 6
        assert len(names[second]) >= 6
        os.killpg(processes[0].pid, 9)  # its resource tracker too, which else might tidy up
        processes[0].wait()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "unlink", interrupted_after(2, Path.unlink, f"{first:06}_"))
            with pytest.raises(KeyboardInterrupt):  # as one is that is killed while it cleans
                clean_stale()
        assert 4 <= len(list(SHARED.glob(f"{first:06}_*"))) < len(names[first])
        assert first in clean_stale()
        assert not list(SHARED.glob(f"{first:06}_*"))
        assert {path.name for path in SHARED.glob(f"{second:06}_*")} == names[second]
        assert second not in clean_stale()
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
            process.wait()
            process.stdout.close()
        clean_stale()


def test_locks_are_where_the_segments_are():
    """Nodes or containers that share /tmp would wait for one another's starts, each with its own shared memory."""
    assert claims().parent == SHARED


def test_a_segment_taken_by_another_since_is_not_touched(tmp_path):
    folder = claims()
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "999999").write_text(f"{'1 2':<64}")
    other = SHARED / "999999_locals"
    other.write_bytes(b"another job's")
    try:
        assert 999999 not in clean_stale()
        assert other.exists()
        assert not (folder / "999999").exists()
    finally:
        other.unlink()


def test_one_line_of_any_error():
    assert plain(ValueError("a: b")) == "a: b"
    wrapped = 'Caught DataError in worker process 0.\nTraceback\n  File "x"\ntrain.data.errors.DataError: /x: bad\n'
    assert plain(RuntimeError(wrapped)) == "/x: bad"
    assert plain(RuntimeError("")) == "RuntimeError"


def test_paths_stay_paths():
    data = DataConfig(path="s3://bucket/set/", cache="/c")
    assert split(data, "train").remote == "s3://bucket/set/train"
    assert split(data, "train").at("index.json") == "s3://bucket/set/train/index.json"
    assert split(DataConfig(path="here"), "val") == Source(Path("here/val"))


def test_a_killed_loader_process_is_an_error_of_the_data():
    lost = lost_worker(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))
    assert str(lost).startswith("data.workers: DataLoader worker (pid 7) is killed by signal: Killed.")
    assert lost_worker(lost) is None
    assert lost_worker(RuntimeError("other")) is None
