"""Preparing under kills, a lost worker and a full disk: one line, and then the same content as an undisturbed run."""

import io
import json
import os
import signal
import sqlite3
import sys
import tarfile
import time

import psutil
import pytest
from PIL import Image

from tests.faults.conftest import ROOT, START, STOP, wait_for
from tests.train.prepare.test_prepare_convert import contents

TARS, EACH, SIDE = 16, 150, 96
HELD = 3  # the unit whose worker waits to be killed
HOLD = """
import os, signal, sys
from pathlib import Path
from train.prepare import convert
from train.prepare.__main__ import main

real = convert.convert

def hold(job, file, number, *rest):
    if number == {held}:
        Path({pid!r}).write_text(str(os.getpid()))
        signal.pause()
    return real(job, file, number, *rest)

convert.convert = hold  # in the workers, too: they import this file
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def picture(number):
    file = io.BytesIO()
    Image.effect_noise((SIDE, SIDE), 60).convert("RGB").save(file, "JPEG", quality=95, comment=str(number).encode())
    return file.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """A folder of tars, with copies and bad captions among their samples."""
    folder = tmp_path_factory.mktemp("tars")
    first = picture(0)
    for n in range(TARS):
        with tarfile.open(folder / f"{n:02}.tar", "w") as tar:
            for i in range(n * EACH, (n + 1) * EACH):
                data = first if i % 100 == 0 else picture(i)
                for extension, content in (("jpg", data), ("txt", b"" if i % 100 == 1 else f"number {i}".encode())):
                    info = tarfile.TarInfo(f"{i:05}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture
def prepare(start, tars):
    """A function (out, *flags) -> Run of prepare on the tars."""

    def begin(out, *flags, program=("-m", "train.prepare"), environment=None):
        command = [sys.executable, *program, "webdataset", tars, "--out", out, "--size", "64"]
        return start([*command, "--shard-mb", "1", "--workers", "2", *flags], out, environment)

    return begin


@pytest.fixture
def held(prepare, tmp_path):
    """A function (out) -> (Run, process id of the worker of unit HELD, which never ends that unit)."""

    def begin(out):
        (tmp_path / "hold.py").write_text(HOLD.format(held=HELD, pid=str(tmp_path / "pid")))
        run = prepare(out, program=[tmp_path / "hold.py"], environment={"PYTHONPATH": str(ROOT)})
        pid = tmp_path / "pid"
        return run, int(wait_for(lambda: pid.exists() and pid.read_text(), START, f"unit {HELD}"))

    return begin


@pytest.fixture(scope="module")
def whole(tars, tmp_path_factory):
    """Contents of an undisturbed run, with another number of workers."""
    from train.prepare.__main__ import main

    out = tmp_path_factory.mktemp("whole") / "out"
    flags = ["--out", str(out), "--size", "64", "--shard-mb", "1", "--workers", "1"]
    assert main(["webdataset", str(tars), *flags]) == 0
    report = json.loads((out / "report.json").read_text())
    assert sum(report["kept"].values()) == TARS * EACH - 2 * TARS * EACH // 100 + 1
    return contents(out)


def done(out, column="result"):
    """Units that a run has committed."""
    path = out / ".prepare" / "journal.sqlite"
    if not path.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
            return db.execute(f"SELECT COUNT({column}) FROM units").fetchone()[0]
    except sqlite3.Error:
        return 0


def kill_group(run):
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    assert run.orphans() == []


def workers(run):
    """Processes that convert: the forkserver's children."""
    found = []
    for process in run.processes():
        try:
            if any("forkserver" in word for word in process.parent().cmdline()):
                found.append(process)
        except (psutil.Error, AttributeError):
            continue
    return found


def test_kill_9_of_everything_again_and_again(prepare, whole, tmp_path):
    """In the plan, in the first pass, twice in the second, and while the shards are joined."""
    out = tmp_path / "out"
    run = prepare(out)
    wait_for(lambda: (out / ".prepare" / "journal.sqlite").exists(), START, "the journal")
    kill_group(run)
    run = prepare(out)
    wait_for(lambda: done(out, "rows") >= 3, START, "the first pass")
    kill_group(run)
    for units in (4, 9):
        run = prepare(out)
        wait_for(lambda n=units: done(out) >= n, START, f"{units} units")
        kill_group(run)
        assert not (out / "report.json").exists()
    run = prepare(out)
    wait_for(lambda: (out / "train" / "index.json").exists() or (out / ".prepare" / "merge").exists(), START, "the end")
    kill_group(run)
    prepare(out).finish()
    assert contents(out) == whole


def test_a_killed_main_process_leaves_no_workers(prepare, whole, tmp_path):
    out = tmp_path / "out"
    run = prepare(out)
    wait_for(lambda: done(out) >= 2, START, "2 units")
    run.process.kill()
    run.process.wait()
    assert run.orphans() == []
    prepare(out).finish()
    assert contents(out) == whole


def test_a_killed_worker_is_named_with_its_unit(prepare, held, whole, tmp_path, tars):
    out = tmp_path / "out"
    run, worker = held(out)
    os.kill(worker, signal.SIGKILL)
    assert run.wait(STOP) == 1
    assert run.orphans() == []
    (line,) = run.output.splitlines()
    assert f"the worker of unit {HELD} ({tars}/{HELD:02}.tar) " in line
    assert "died (SIGKILL, perhaps by the kernel, out of memory); the same command continues" in line
    prepare(out).finish()
    assert contents(out) == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_leaves_a_folder_to_go_on_with(prepare, held, whole, tmp_path, number, code):
    out = tmp_path / "out"
    run, _ = held(out)
    wait_for(lambda: done(out) >= 2, START, "2 units")
    os.killpg(run.process.pid, number)  # as a terminal does
    assert run.wait(STOP) == code
    assert run.orphans() == []
    assert "units are done, the same command continues" in run.output
    assert run.output.count("\n") == 1
    prepare(out).finish()
    assert contents(out) == whole


def test_a_full_disk_is_one_line_and_resumable(prepare, whole, small_disk, tmp_path):
    disk = small_disk(16)
    (disk / "ballast").write_bytes(bytes(10 << 20))
    out = disk / "out"
    run = prepare(out, "--compression", "none")
    assert run.wait() == 1, run.output
    assert run.orphans() == []
    assert run.output.count("\n") == 1
    assert "No space left on device" in run.output or "disk is full" in run.output
    (disk / "ballast").unlink()
    prepare(out, "--compression", "none").finish()
    report = json.loads((out / "report.json").read_text())
    assert report["kept"] == whole["report"]["kept"]
    assert report["skipped"] == whole["report"]["skipped"]


def test_memory_stays_under_a_stated_cap_whatever_the_files_say(start, tmp_path):
    """Pictures of 20k x 20k, bombs in PNGs, a line of half a gigabyte in a .gz: listed, a worker under 512 MiB."""
    import gzip
    import zlib

    from tests.train.prepare.test_prepare_images import chunk, png

    good = io.BytesIO()
    Image.effect_noise((64, 64), 60).save(good, "PNG")
    pictures = {
        "good.png": good.getvalue(),
        "huge.png": png(20_000, 20_000, 8, 2, bytes(1 << 20)),
        "text.png": png(64, 64, 8, 2, bytes(64 * 193), chunk(b"zTXt", b"C\0\0" + zlib.compress(bytes(512 << 20), 9))),
        "pixels.png": png(64, 64, 8, 2, bytes(512 << 20)),
    }
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for name in pictures:
            file.write(json.dumps({"image": name, "caption": name}).encode() + b"\n")
        file.write(b'{"image": "good.png", "caption": "')
        for _ in range(512):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n')
    out = tmp_path / "out"
    command = [sys.executable, "-m", "train.prepare", "jsonl", tmp_path / "a.jsonl.gz", "--out", out, "--size", "64"]
    run = start([*command, "--workers", "1", "--val", "0"], out)
    peak = 0
    while run.process.poll() is None:
        for process in workers(run):
            try:
                peak = max(peak, process.memory_full_info().uss)
            except psutil.Error:
                continue
        time.sleep(0.05)
    assert run.process.returncode == 0, run.output
    reasons = {
        line["key"]: line["reason"] for line in map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    }
    assert reasons.pop("huge.png") == "image_pixels"
    assert reasons.pop("text.png") == "image_broken"
    assert "row_long" in reasons.values()
    assert 0 < peak < 512 << 20, peak
