"""Data that is damaged, hostile, out of reach or in the way: all ranks end soon, one line names it, or it is mended."""

import hashlib
import io
import json
import math
import signal
import sys
from pathlib import Path

import boto3
import numpy as np
import psutil
import pytest
import zstd
from PIL import Image
from streaming import MDSWriter

from tests.faults.conftest import STOP, free_port, losses, wait_for
from train.data.memory import SHARED

COLUMNS = {"image": "bytes", "caption": "str"}
LIMIT = 1 << 15  # bytes of a shard: about ten samples


def noise(at, size=(32, 32)):
    """A picture that no compression makes small."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(at).integers(0, 255, (*size[::-1], 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path):
    """A function (samples, compression=None) -> folder of a new corpus of small shards, tmp_path / "data"."""

    def write(samples=43, compression=None):
        for split, count in (("train", samples), ("val", 4)):
            out = str(tmp_path / "data" / split)
            with MDSWriter(columns=COLUMNS, out=out, compression=compression, hashes=["sha256"], size_limit=LIMIT) as w:
                for i in range(count):
                    w.write({"image": noise(i), "caption": f"{['red', 'green', 'blue'][i % 3]} circle"})
        return tmp_path / "data"

    return write


class Store:
    """An S3 server of its own process on this machine, and its bucket "data"."""

    def __init__(self, start, folder):
        self.start, port = start, str(free_port())
        self.process = start([Path(sys.executable).parent / "moto_server", "-H", "127.0.0.1", "-p", port], folder)
        address = f"http://127.0.0.1:{port}"
        self.environment = {
            "S3_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        self.client = boto3.client(
            "s3", endpoint_url=address, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
        )
        wait_for(lambda: "Running on" in self.process.output, 120, "the S3 server")
        self.client.create_bucket(Bucket="data")

    def put(self, folder):
        """Upload a folder; returns its URL."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.client.upload_file(str(path), "data", f"set/{path.relative_to(folder)}")
        return "s3://data/set"


@pytest.fixture
def store(start, tmp_path):
    return Store(start, tmp_path)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def check(run, *named, code=1):
    """It ends soon after one line that names this, non-zero, and leaves nothing."""
    run.says("error: ")
    assert run.wait(STOP) == code, run.output[-3000:]
    assert len(run.errors) == 1, run.output[-6000:]
    for word in named:
        assert word in run.errors[0]
    assert "Traceback" not in run.output, run.output[-6000:]
    assert run.orphans() == []


DAMAGE = {"flipped": flip, "truncated": truncate, "missing": lambda path: path.unlink()}
SAYS = {"flipped": "is not what was written", "truncated": "bytes, wanted", "missing": "is missing"}


@pytest.mark.parametrize(
    ("damage", "workers", "ranks"),
    [("flipped", 0, 1), ("flipped", 2, 2), ("truncated", 2, 1), ("truncated", 0, 2), ("missing", 2, 2)],
)
def test_a_damaged_shard_ends_every_rank_and_the_next_run_sees_it_too(launch, data, damage, workers, ranks):
    folder = data()
    shard = sorted((folder / "train").glob("shard*"))[2]
    DAMAGE[damage](shard)
    flags = (f"--data.path={folder}", f"--data.workers={workers}", "--steps=100000")
    for _ in range(2 if ranks == 1 else 1):
        check(launch("run", *flags, ranks=ranks), str(shard), SAYS[damage])


def loader_process(run):
    """A loader process of a rank that was started without the launcher. It ends with its epoch: let that be long."""
    return next(p for p in psutil.Process(run.process.pid).children() if "train/run.py" in p.cmdline())


def test_a_rank_alone_that_has_no_data_ends_the_others_without_a_launcher(launch_ranks, data):
    """As on two nodes, where no launcher of the one sees the other."""
    first, second = launch_ranks("run", f"--data.path={data(1600)}", "--data.workers=1", "--steps=100000")
    first.at_step(2)
    loader_process(second).kill()
    check(second, "data.workers: DataLoader worker")
    assert first.wait(STOP) == 1
    assert first.errors == []
    assert "Traceback" not in first.output, first.output
    assert first.orphans() == []


def test_a_killed_loader_process_is_an_error(launch, data):
    run = launch("run", f"--data.path={data(1600)}", "--data.workers=2", "--steps=100000")
    run.at_step(3)
    loader_process(run).kill()
    check(run, "data.workers: DataLoader worker")


def test_a_store_is_read_through_a_cache_that_mends_itself(launch, data, store, tmp_path):
    """zstd shards of an S3 server: as from the folder; a bad copy in the cache is fetched again, a bad object named."""
    folder = data(compression="zstd")
    flags = ("--steps=7", "--batch_size=8")  # past the end of an epoch of 5 steps
    there = store.put(folder)
    alone = launch("alone", *flags, f"--data.path={folder}").finish()
    remote = (*flags, f"--data.path={there}", f"--data.cache={tmp_path / 'cache'}", "--data.workers=2")
    first = launch("first", *remote, environment=store.environment).finish()
    assert losses(first.folder) == losses(alone.folder)
    assert len(losses(first.folder)) == 7
    cached = sorted((tmp_path / "cache").glob("*/train/shard*"))
    assert all(path.suffix == ".mds" for path in cached)
    flip(cached[0])
    truncate(cached[1])
    cached[2].unlink()
    second = launch("second", *remote, environment=store.environment).finish()
    assert losses(second.folder) == losses(alone.folder)
    flip(sorted((folder / "train").glob("*.zstd"))[0])
    store.put(folder)
    cached[0].unlink()
    check(
        launch("third", *remote, environment=store.environment),
        "s3://data/set/train/shard.00000.mds.zstd",
        "is not what was written",
    )


def test_aspect_buckets_of_a_store(launch, store, tmp_path):
    """As from the folder; without buckets.json the index that is missed is named, another one is refused."""
    folder = tmp_path / "data"
    for split, count in (("train", 24), ("val", 2)):
        for size in ((32, 16), (16, 32)):
            out = folder / split / "{}x{}".format(*size)
            with MDSWriter(columns=COLUMNS, out=str(out), hashes=["sha256"], size_limit=LIMIT) as writer:
                for i in range(count):
                    writer.write({"image": noise(i, size), "caption": "red circle"})
        (folder / split / "buckets.json").write_text('["16x32", "32x16"]')
    flags = ("--steps=7", "--batch_size=8")
    remote = (*flags, f"--data.path={store.put(folder)}", f"--data.cache={tmp_path / 'cache'}")
    alone = launch("alone", *flags, f"--data.path={folder}").finish()
    assert "sizes 16x32 24, 32x16 24" in alone.output
    there = launch("there", *remote, ranks=2, environment=store.environment).finish()
    one, other = losses(alone.folder), losses(there.folder)
    assert list(one) == list(other) == list(range(1, 8))
    assert all(math.isclose(one[step], other[step], rel_tol=1e-5) for step in one), (one, other)
    store.client.put_object(Bucket="data", Key="set/train/buckets.json", Body=b'["../32x16"]')
    named = "wanted a list of folders WIDTHxHEIGHT in s3://data/set/train/buckets.json"
    check(launch("odd", *remote, environment=store.environment), named, code=2)
    store.client.delete_object(Bucket="data", Key="set/train/buckets.json")
    named = "s3://data/set/train/index.json"
    check(launch("none", *remote, environment=store.environment), named, code=2)


def test_a_store_that_goes_away_ends_the_run(launch, data, store, tmp_path):
    """A cache that holds a part, so that the run keeps asking; two ranks."""
    there = store.put(data(200))
    cache = (f"--data.cache={tmp_path / 'cache'}", f"--data.cache_gb={5 * LIMIT / 2**30}")
    run = launch("run", f"--data.path={there}", *cache, "--steps=100000", ranks=2, environment=store.environment)
    run.at_step(5)
    held = [path for path in (tmp_path / "cache").rglob("shard*") if ".part-" not in path.name]
    assert len(held) <= 5 + 4  # beside what it may hold, one on its way for each of two threads of two ranks
    store.process.kill()
    check(run, "s3://data/set/train/shard.")
    check(
        launch("next", f"--data.path={there}", *cache, "--steps=9", environment=store.environment),
        "s3://data/set/train/index.json",
    )


def test_a_full_disk_under_the_cache_is_an_error(launch, data, store, small_disk):
    there = store.put(data(400))
    run = launch(
        "run", f"--data.path={there}", f"--data.cache={small_disk(1)}", "--steps=100000", environment=store.environment
    )
    check(run, "shard.", "No space left on device")


@pytest.mark.parametrize("case", ["above", "absolute", "pickle"])
def test_a_hostile_index_is_refused_and_writes_nothing(launch, data, store, tmp_path, case):
    folder = data()
    path = folder / "train" / "index.json"
    index = json.loads(path.read_text())
    shard = index["shards"][0]
    if case == "pickle":
        shard["column_encodings"] = ["bytes", "pkl"]
    else:
        shard["raw_data"]["basename"] = "../../../x.mds" if case == "above" else f"{tmp_path}/x.mds"
    path.write_text(json.dumps(index))
    there = store.put(folder)
    run = launch("run", f"--data.path={there}", f"--data.cache={tmp_path / 'a' / 'b'}", environment=store.environment)
    check(run, "index.json: shards[0].", "got 'pkl'" if case == "pickle" else "a file name inside the folder", code=2)
    assert [p.name for p in tmp_path.rglob("*.mds") if not p.is_relative_to(folder)] == []
    assert not run.folder.exists()


def test_a_bomb_is_not_unpacked(launch, data):
    folder = data(compression="zstd")
    path = folder / "train" / "index.json"
    index = json.loads(path.read_text())
    info = index["shards"][0]["zip_data"]
    bomb = zstd.compress(bytes(1 << 30))
    (folder / "train" / info["basename"]).write_bytes(bomb)
    info |= {"bytes": len(bomb), "hashes": {"sha256": hashlib.sha256(bomb).hexdigest()}}
    path.write_text(json.dumps(index))
    check(launch("run", f"--data.path={folder}", "--steps=9"), info["basename"], "unpacks to 1,073,741,824 bytes")


def test_what_a_killed_run_leaves_is_cleaned_and_a_living_one_untouched(launch, data):
    flags = (f"--data.path={data()}", "--steps=100000")

    def segments():
        return {path.name[:6] for path in SHARED.glob("??????_locals")}

    before = segments()
    alive = launch("alive", *flags)
    alive.at_step(1)
    his = segments() - before
    dead = launch("dead", *flags, "--data.workers=2")
    dead.at_step(1)
    left = segments() - before - his
    dead.process.send_signal(signal.SIGSTOP)  # so that nobody tidies up
    for process in dead.processes():
        process.kill()
    wait_for(lambda: not dead.processes(), 30, "its end")
    assert left
    assert left <= segments()
    after = launch("dead", f"--data.path={flags[0].partition('=')[2]}", "--steps=3").finish()
    assert not left & segments()
    assert his <= segments()
    step = max(losses(alive.folder))
    alive.at_step(step + 3)
    assert after.orphans() == []


def test_one_rank_then_two_then_one_trains_on_the_same_samples(launch, data):
    """43 samples do not fill six batches of 8; 13 steps pass two ends of an epoch."""
    flags = (f"--data.path={data()}", "--batch_size=8", "--steps=13")
    whole = launch("whole", *flags).finish()
    launch("parts", *flags, "--stop_at=3").finish()
    launch("parts", *flags, "--stop_at=7", "--data.workers=1", ranks=2).finish()
    parts = launch("parts", *flags, "--data.workers=2").finish()
    one, other = losses(whole.folder), losses(parts.folder)
    assert list(other) == list(range(1, 14))
    assert all(math.isclose(one[step], other[step], rel_tol=1e-5) for step in one), (one, other)
