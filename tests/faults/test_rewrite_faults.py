"""kill -9 and a full disk while a prepared folder is rewritten; the same command then finishes it."""

import json
import os
import signal
import sys

import pytest

from tests.faults.conftest import wait_for
from tests.train.prepare.chat_server import good, serving
from train.prepare import prepare_shapes

CONCURRENCY = 4


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """48 samples in several small shards, made of the shapes corpus."""
    from streaming import MDSWriter, StreamingDataset

    folder = tmp_path_factory.mktemp("shapes")
    prepare_shapes(folder / "one", samples=40, captions=20, val=8, prompts=1, progress=False)
    for name in ("train", "val"):
        samples = list(StreamingDataset(local=str(folder / "one" / name), shuffle=False, batch_size=1))
        columns = {"image": "bytes", "caption": "str", "meta": "json"}
        with MDSWriter(
            out=str(folder / "many" / name), columns=columns, compression="zstd", hashes=["sha256"], size_limit=6000
        ) as writer:
            for sample in samples:
                writer.write(sample)
    return folder / "many"


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and "answers" not in p.parts  # in the order they came
    }


def test_recaption_killed_twice_asks_nothing_twice_but_what_was_in_flight(shapes, start, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "train.prepare", "recaption", f"--source={shapes}", f"--concurrency={CONCURRENCY}"]

    def slow(image, attempt):
        server.stop.wait(0.02)  # so that there is a time to kill in
        return good(image, attempt)

    with serving(slow) as server:
        command.append(f"--base-url={server.url}")
        for asked in (10, 27):
            run = start([*command, f"--out={out}"])
            wait_for(lambda n=asked: sum(server.asked.values()) >= n, 120, f"{asked} questions")
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()
        start([*command, f"--out={out}"]).finish()
        images = len(server.asked)
        assert sum(server.asked.values()) <= images + 2 * CONCURRENCY
        start([*command, f"--out={tmp_path / 'whole'}"]).finish()
    assert contents(out) == contents(tmp_path / "whole")
    rows = [json.loads(line) for path in out.glob("answers/*/*.jsonl") for line in path.open()]
    assert len(rows) == 48  # each image's answer once


def test_moments_killed_between_any_two_writes_ends_with_the_same_bytes(shapes, start, tmp_path):
    from tests.train.prepare.test_moments import make_vae

    make_vae().save_pretrained(tmp_path / "vae")
    flags = ["moments", f"--source={shapes}", f"--vae={tmp_path / 'vae'}", "--device=cpu", "--batch-size=4"]
    start([sys.executable, "-m", "train.prepare", *flags, f"--out={tmp_path / 'whole'}"]).finish()
    # Dies in place of the n-th rename: every shard, entry, copied file, index and report is put in place by one.
    dying = (
        "import os, signal, sys; from train.prepare.__main__ import main\n"
        "real = os.replace; left = [int(sys.argv[1])]\n"
        "def replace(*paths):\n"
        "    left[0] -= 1\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if left[0] < 0 else real(*paths)\n"
        "os.replace = replace; sys.exit(main(sys.argv[2:]))"
    )
    deaths = 0
    while True:
        run = start([sys.executable, "-c", dying, 7, *flags, f"--out={tmp_path / 'out'}"])
        code = run.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL, run.output
        deaths += 1
        assert deaths < 20, "no progress between deaths"
    assert deaths >= 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_ends_in_one_line_and_the_command_continues_with_room(shapes, start, small_disk, tmp_path):
    disk = small_disk(1)
    (disk / "filler").write_bytes(bytes(1_000_000))
    with serving() as server:
        command = [sys.executable, "-m", "train.prepare", "recaption", f"--source={shapes}", f"--base-url={server.url}"]
        command.append(f"--out={disk / 'out'}")
        run = start(command)
        assert run.wait() == 1
        assert run.output.count("error: ") == 1
        assert "No space left" in run.output
        (disk / "filler").unlink()
        start(command).finish()
        start([*command[:-1], f"--out={tmp_path / 'whole'}"]).finish()
    assert contents(disk / "out") == contents(tmp_path / "whole")
