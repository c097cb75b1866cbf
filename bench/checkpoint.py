"""What a checkpoint costs: `python -m bench.checkpoint`, then `python -m bench.report`.

A save and a verified load of about one gigabyte of state (masters, two moments, average), split into gathering,
writing, flushing to the disk and hashing, beside a plain copy of the same bytes, flushed, in the same rounds; what of
a save with --async_save training waits for, at its beginning and its end; and the share of the demo's training time
that the hashes of its two checkpoints take. On one process with ZeRO-1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import provenance
from sr_model import build
from train import checkpoint
from train.config import Config
from train.distributed import Ranks, start
from train.engine import Ema, FullState, build_engine

PARTS = ("gather", "write", "flush", "hash")


class Spent:
    """Seconds spent in functions of train.checkpoint, by PARTS, while they are watched."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, its time added to a part."""

        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                self.seconds[part] += time.perf_counter() - began

        return call

    def timed_steps(self, part: str, work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """`work`, a generator function, with the time of its steps added to a part."""

        def call(*arguments: Any) -> Iterator[Any]:
            step = self.timed(part, work(*arguments).__next__)
            with contextlib.suppress(StopIteration):
                while True:
                    yield step()

        return call

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, what a save and a load call is timed."""
        names = {"save_file": "write", "sync": "flush", "sha256": "hash"}
        kept = {name: getattr(checkpoint, name) for name in (*names, "_shares")}
        for name, part in names.items():
            setattr(checkpoint, name, self.timed(part, kept[name]))
        checkpoint._shares = self.timed_steps("gather", kept["_shares"])  # type: ignore[assignment]
        try:
            yield
        finally:
            for name, work in kept.items():
                setattr(checkpoint, name, work)


def freed(folder: Path, size: int) -> None:
    """Leave so many bytes of memory free that the machine has in fact: a virtual one gives back what is free for some
    seconds and gets it anew page by page, which would be charged to whoever writes next."""
    scratch = folder / "scratch"
    with scratch.open("wb") as file:
        for _ in range(-(-size // (1 << 24))):
            file.write(bytes(1 << 24))
    scratch.unlink()


def copied(source: Path, target: Path) -> float:
    """Seconds of copying a folder's files, each flushed to the disk."""
    target.mkdir()
    began = time.perf_counter()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        checkpoint.sync(target / file.name)
    took = time.perf_counter() - began
    shutil.rmtree(target)
    return took


def measure(folder: Path, hidden: int, rounds: int, ranks: Ranks) -> dict[str, Any]:
    """Medians over the rounds, in seconds for a gigabyte (1e9 bytes), and the checkpoint's bytes."""
    config = Config(batch_size=1, zero=1, dtype="fp32", compile="false")
    sizes = {"hidden_size": hidden, "mlp_size": 4 * hidden, "depth": 4, "num_heads": hidden // 64, "num_kv_heads": 4}
    torch.manual_seed(0)
    model = build("s2", "demo", head_dim=64, text_dim=576, text_layers=30, **sizes)
    engine = build_engine(model, config, ranks.world, bf16=False)
    ema, rows = Ema(engine, 0.999), []
    FullState(engine).link()
    state_bytes = checkpoint.PARAMETER_BYTES * sum(p.numel() for p in model.parameters())
    for step in tqdm(range(1, rounds + 2), desc="saving and loading", unit="round", disable=not ranks.first):
        freed(folder, 2 * state_bytes)
        spent, began = Spent(), time.perf_counter()
        with spent.watched():
            path = checkpoint.save(folder, step, engine, ema, ranks, {}, keep=1)
        row = {"save": time.perf_counter() - began, **spent.seconds}
        size = sum(file.stat().st_size for file in path.iterdir())
        freed(folder, 2 * state_bytes)
        row["copy"] = copied(path, folder / "copy")
        began = time.perf_counter()
        assert checkpoint.fault(path) is None
        row["verify"] = time.perf_counter() - began
        shutil.rmtree(path)
        freed(folder, 2 * state_bytes)
        began = time.perf_counter()
        saving = checkpoint.BackgroundSave(folder, step, engine, ema, ranks, {}, keep=1)
        row["held"] = time.perf_counter() - began
        while saving.busy:
            time.sleep(0.01)
        began = time.perf_counter()
        saving.finish()
        row["held"] += time.perf_counter() - began
        began = time.perf_counter()
        checkpoint.load(path, engine, ema)
        row["load"] = time.perf_counter() - began
        rows.append({key: seconds / size * 1e9 for key, seconds in row.items()})
    kept = rows[1:]  # the first round makes the disk's blocks and the allocator's memory
    return {
        "bytes": size,
        "rounds": rounds,
        "seconds_per_gb": {key: statistics.median(row[key] for row in kept) for key in kept[0]},
        "save_over_copy": statistics.median(row["save"] / row["copy"] for row in kept),
        "save_over_copy_quartiles": statistics.quantiles([row["save"] / row["copy"] for row in kept], n=4)[::2],
    }


def demo_share(hash_seconds_per_gb: float) -> dict[str, Any] | None:
    """The share of the demo's training time (bench/results/demo.json) that the hashes of its checkpoints would take."""
    path = provenance.RESULTS / "demo.json"
    if not path.is_file():
        return None
    demo = json.loads(path.read_text())
    parameters = sum(p.numel() for p in build("s3", "demo", device="meta", text_dim=576, text_layers=30).parameters())
    size, checkpoints = checkpoint.PARAMETER_BYTES * parameters, 2
    seconds = checkpoints * size / 1e9 * hash_seconds_per_gb
    return {
        "bytes": size,
        "checkpoints": checkpoints,
        "hash_seconds": seconds,
        "training_seconds": demo["training_seconds"],
        "share": seconds / demo["training_seconds"],
    }


def main(argv: list[str] | None = None) -> int:
    """Command line; writes bench/results/checkpoint-DEVICE.json."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024, metavar="N", help="the model's width (default 1024: 1 GB)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="after a first that is left out (default 5)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder's disk)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds: wanted at least 2, got {arguments.rounds}")
    if arguments.hidden < 256 or arguments.hidden % 256:
        parser.error(f"--hidden: wanted a multiple of 256, got {arguments.hidden}")
    ranks = start()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measured = measure(Path(folder), arguments.hidden, arguments.rounds, ranks)
    result = {
        **provenance.header(),
        "zero": 1,
        "load_average": os.getloadavg()[0],
        **measured,
        "demo": demo_share(measured["seconds_per_gb"]["hash"]),
    }
    path = provenance.result_path("checkpoint")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}; `python -m bench.report` puts it into the README")
    return 0


if __name__ == "__main__":
    code = main()
    torch.distributed.destroy_process_group()
    sys.exit(code)
