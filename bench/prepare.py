"""Preparing a corpus, killed twice on the way: `python -m bench.prepare`, then `python -m bench.report`.

Writes webdataset tars of small captioned pictures, each with its number drawn in it, and copies, cut-off files and
empty captions among them; prepares a quarter of them unbroken, then all of them with two kill -9 of everything on the
way; reads every sample back (each number once, with its caption and picture); and watches the memory of all processes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

from bench import provenance

SIDE, SIZE, CELLS = 64, 32, 8  # of the pictures before and after, and of the grid of bits drawn in them
PER_TAR = 2500
ODD = 500  # of so many samples each, one is a copy, one cut off, one without a caption
SAMPLE_EVERY = 0.5  # seconds between looks at the memory


def drawn(number: int) -> Image.Image:
    """A picture whose 8x8 cells are the bits of the number, over and over, light or dark."""
    bits = [number >> (i % 32) & 1 for i in range(CELLS * CELLS)]
    cells = np.array(bits, np.uint8).reshape(CELLS, CELLS) * 160 + 40
    return Image.fromarray(np.kron(cells, np.ones((SIDE // CELLS, SIDE // CELLS), np.uint8))).convert("RGB")


def read_number(data: bytes) -> int:
    """The number in a prepared picture. Raises: ValueError where its two copies of the bits differ."""
    with Image.open(io.BytesIO(data)) as image:
        grey = np.asarray(image.convert("L"), np.float64)
    step = grey.shape[0] // CELLS
    bits = (grey.reshape(CELLS, step, CELLS, step).mean((1, 3)) > 120).reshape(2, 32)
    if (bits[0] != bits[1]).any():
        raise ValueError("a picture's bits do not agree")
    return sum(int(bit) << i for i, bit in enumerate(bits[0]))


def caption(number: int) -> str:
    """The caption of a number."""
    return f"the bits of {number}, light on dark"


def jpeg(number: int) -> bytes:
    """The source file of a number."""
    file = io.BytesIO()
    drawn(number).save(file, "JPEG", quality=90)
    return file.getvalue()


def fate(number: int) -> str:
    """What becomes of a sample: kept, or the reason why not."""
    return {1: "duplicate", 2: "image_broken", 3: "caption_empty"}.get(number % ODD, "kept")


def write_tars(folder: Path, samples: int) -> None:
    """Tars of the numbers below `samples`; those whose fate is to be left out are made to be."""
    folder.mkdir(parents=True)
    for first in tqdm(range(0, samples, PER_TAR), desc="tars", unit="tar", file=sys.stderr):
        with tarfile.open(folder / f"{first // PER_TAR:05}.tar", "w") as tar:
            for number in range(first, min(first + PER_TAR, samples)):
                end = fate(number)
                data = jpeg(number - 1 if end == "duplicate" else number)
                data = data[:-16] if end == "image_broken" else data
                text = b" " if end == "caption_empty" else caption(number).encode()
                for extension, content in (("jpg", data), ("txt", text)):
                    info = tarfile.TarInfo(f"{number:09}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def memory(process: psutil.Process) -> int:
    """Bytes of a process and all below it, shared pages counted once (PSS)."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:  # it ended meanwhile
            continue
    return total


def units_done(out: Path) -> int:
    """Units of the second pass that are committed."""
    path = out / ".prepare" / "journal.sqlite"
    if not path.is_file():
        return 0
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
            return db.execute("SELECT COUNT(result) FROM units").fetchone()[0]
    except sqlite3.Error:  # not made yet, or locked
        return 0


def run_once(command: list[str], out: Path, kill_at: int | None, seen: list[tuple[float, int]], start: float) -> bool:
    """Run the command; kill -9 its whole group once so many units are done. Returns whether it finished.

    seen: gets (seconds since `start`, bytes) pairs. Raises: RuntimeError where it fails by itself.
    """
    process = subprocess.Popen(command, start_new_session=True)
    watched = psutil.Process(process.pid)
    try:
        while process.poll() is None:
            seen.append((round(time.monotonic() - start, 2), memory(watched)))
            if kill_at is not None and units_done(out) >= kill_at:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return False
            time.sleep(SAMPLE_EVERY)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RuntimeError(f"prepare ended with {process.returncode}")
    return True


def verify(out: Path, samples: int) -> dict[str, Any]:
    """Read all back. Returns what the report says. Raises: RuntimeError for the first thing that is not right."""
    from streaming import StreamingDataset

    found: Counter[int] = Counter()
    for split in ("train", "val"):
        dataset = StreamingDataset(local=str(out / split), batch_size=1)
        for i in tqdm(range(dataset.num_samples), desc=f"verify {split}", unit="sample", file=sys.stderr):
            sample = dataset[i]
            number = int(sample["meta"]["key"])
            if read_number(sample["image"]) != number or sample["caption"] != caption(number):
                raise RuntimeError(f"sample {number} has another's picture or caption")
            found[number] += 1
    wanted = Counter(fate(number) for number in range(samples))
    if found != Counter(number for number in range(samples) if fate(number) == "kept"):
        raise RuntimeError(f"wanted {wanted['kept']} samples once each, got {len(found)}, {sum(found.values())} in all")
    report = json.loads((out / "report.json").read_text())
    lines = (out / "quarantine.jsonl").read_text().splitlines()
    listed = Counter(json.loads(line)["reason"] for line in lines)
    del wanted["kept"]
    if report["skipped"] != dict(sorted(wanted.items())) or listed != wanted:
        raise RuntimeError(f"wanted {dict(wanted)} left out, got {report['skipped']}, listed {dict(listed)}")
    return report


def measure(work: Path, samples: int, kills: int, workers: int) -> dict[str, Any]:
    """Prepare the first `samples` of the tars in `work`, kill it on the way, verify."""
    tars = sorted((work / "tars").glob("*.tar"))[: -(-samples // PER_TAR)]
    out = work / f"out-{samples}"
    command = [sys.executable, "-m", "train.prepare", "webdataset", *map(str, tars), "--out", str(out)]
    command += ["--size", str(SIZE), "--workers", str(workers)]
    seen: list[tuple[float, int]] = []
    start, killed = time.monotonic(), []
    for i in range(kills):
        if not run_once(command, out, len(tars) * (i + 1) // (kills + 1), seen, start):
            killed.append(units_done(out))
    run_once(command, out, None, seen, start)
    wall = time.monotonic() - start
    report = verify(out, samples)
    shutil.rmtree(out)
    third = seen[len(seen) * 2 // 3 :]
    return {
        "samples": samples,
        "tars": len(tars),
        "killed_at_units": killed,
        "wall_seconds": wall,
        "seconds": report["seconds"],
        "samples_per_s": report["samples_per_s"],
        "kept": report["kept"],
        "skipped": report["skipped"],
        "bytes_in": report["bytes_in"],
        "bytes_out": report["bytes_out"],
        "peak_bytes": max(b for _, b in seen),
        "last_third_peak_bytes": max(b for _, b in third),
        "memory": seen[:: max(1, len(seen) // 60)],
    }


def main(argv: list[str] | None = None) -> int:
    """Command line; writes bench/results/prepare-DEVICE.json."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=300_000, help="pictures in all (default 300000)")
    parser.add_argument("--kills", type=int, default=2, help="kill -9 on the way (default 2)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: the cores)")
    parser.add_argument("--work", type=Path, help="folder to work in, deleted at the end (default: a temporary one)")
    options = parser.parse_args(argv)
    if options.samples < 4 * PER_TAR:
        parser.error(f"--samples: wanted at least {4 * PER_TAR}, got {options.samples}")
    work = Path(tempfile.mkdtemp(prefix="bench-prepare-", dir=options.work))
    try:
        write_tars(work / "tars", options.samples)
        rows = [measure(work, options.samples // 4, 0, options.workers)]
        rows.append(measure(work, options.samples, options.kills, options.workers))
    finally:
        shutil.rmtree(work)
    result = {**provenance.header(), "workers": options.workers, "side": SIDE, "size": SIZE, "rows": rows}
    path = provenance.result_path("prepare")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}; `python -m bench.report` puts it into the README")
    return 0


if __name__ == "__main__":
    sys.exit(main())
