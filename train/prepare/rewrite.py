"""A prepared folder into a new one, shard by shard: the same samples in the same order with one column more.

OUT/.rewrite/ holds what was asked and an entry for each finished shard; a shard's file is renamed into place before its
entry, and the indexes, the list of quarantined samples and the report come last. A command that was killed continues
from the entries when it is given again; OUT is complete once it holds COLUMN.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from train.config import ConfigError
from train.disk import alone, replace_text
from train.prepare.shards import write_buckets
from train.shapes.corpus import BadArgument

WORK = ".rewrite"
LARGEST_SHARD = (1 << 32) - 1  # MDS offsets are uint32
Sample = dict[str, Any]
Tick = Callable[[int], Any]


class BrokenShard(OSError):
    """A shard that is not what its index says; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Outcome:
    """One shard's new values, its samples for quarantine.jsonl (index in the shard, reason, detail), other counts."""

    values: Sequence[Any]
    quarantined: Sequence[tuple[int, str, str]] = ()
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Added:
    """The new column: its name and MDS encoding, how a shard's values are made, what the indexes shall say about it.

    compute: (place such as "train/00003", the shard's samples, tick) -> Outcome; it calls tick(n) as samples get done.
    drop: a column left out of the new shards. metadata: goes into every index.json, under the column's name.
    """

    name: str
    encoding: str
    compute: Callable[[str, list[Sample], Tick], Outcome]
    drop: str | None = None
    metadata: dict[str, Any] | None = None


def _wrong(path: Path, what: str) -> BrokenShard:
    return BrokenShard(f"{path}: {what}")


def read_index(folder: Path) -> dict[str, Any]:
    """A split's index.json, checked as training checks it; it may have no shards. Raises: BrokenShard."""
    from train.data.index import check_index

    path = folder / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index != {"version": 2, "shards": []}:
            check_index(index, str(path), ())
    except ConfigError as error:
        raise BrokenShard(str(error).removeprefix("data.path: ")) from None
    except ValueError as error:
        raise _wrong(path, f"wanted an MDS index, cannot read it: {error}") from None
    return index


def read_shard(folder: Path, shard: dict[str, Any]) -> list[Sample]:
    """A shard's samples, its file's size and hash compared with the index. Raises: BrokenShard."""
    from streaming.base.format import FileInfo
    from streaming.base.format.mds import MDSReader

    from train.data.shards import fault, undo, wrong_hash

    info = FileInfo(**shard["raw_data"])
    packed = shard["zip_data"] is not None and not (folder / info.basename).exists()
    file = FileInfo(**shard["zip_data"]) if packed else info
    path = folder / file.basename
    if path.resolve().parent != folder.resolve():
        raise _wrong(path, "wanted a file in the split's folder, found a link out of it")
    if what := fault(path, file):
        raise _wrong(path, what)
    try:
        raw = path.read_bytes()
        if packed:
            raw = undo(raw, shard["compression"], info.bytes)
            if name := wrong_hash(raw, info):
                raise ValueError(f"unpacked it is not what was written ({name} differs)")
        (count,) = np.frombuffer(raw, np.uint32, 1).tolist()
        if count != shard["samples"]:
            raise ValueError(f"has {count} samples, its index says {shard['samples']}")
        offsets = np.frombuffer(raw, np.uint32, count + 1, offset=4).tolist()
        reader = MDSReader.from_json(str(folder), None, shard)
        return [reader.decode_sample(raw[a:b]) for a, b in pairwise(offsets)]
    except Exception as error:  # zstd, zlib and the columns' decoders have their own
        raise _wrong(path, f"wanted an MDS shard: {error}") from None


def find_splits(source: Path) -> dict[str, dict[str, Any]]:
    """The checked index of every split and aspect bucket: {"train": ..., "val": ...} or {"train/256x192": ...}.

    Raises: BadArgument where there are none, BrokenShard.
    """
    folders = sorted(path.parent for pattern in ("*", "*/*") for path in source.glob(f"{pattern}/index.json"))
    splits = {str(folder.relative_to(source)): read_index(folder) for folder in folders}
    if not any(name.split("/")[0] == "train" for name in splits):
        raise BadArgument(f"source: wanted a prepared folder with train/index.json, found none in {source}")
    return splits


def columns_of(index: dict[str, Any]) -> dict[str, str]:
    """Column -> encoding of a split; {} where it has no shards."""
    if not index["shards"]:
        return {}
    first = index["shards"][0]
    return dict(zip(first["column_names"], first["column_encodings"], strict=True))


def _write_shard(
    work: Path, folder: Path, number: int, columns: dict[str, str], rows: Iterator[Sample], compression: str | None
) -> dict[str, Any]:
    """Writes one shard and renames it into `folder`; its entry for the index."""
    from streaming import MDSWriter

    partial = work / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    writer = MDSWriter(out=str(partial), columns=columns, compression=compression, hashes=["sha256"], size_limit=None)
    for row in rows:
        writer.write(row)
        if writer.new_shard_size > LARGEST_SHARD:
            raise OSError(f"{folder}: shard {number} grows past 4 GiB, prepare the source with smaller shards")
    writer.finish()
    (entry,) = json.loads((partial / "index.json").read_text())["shards"]
    for info in filter(None, (entry["raw_data"], entry["zip_data"])):
        old, info["basename"] = info["basename"], info["basename"].replace("00000", f"{number:05d}", 1)
        if (partial / old).exists():
            with open(partial / old, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial / old, folder / info["basename"])
    shutil.rmtree(partial)
    return entry


def _same(found: dict[str, Any], wanted: dict[str, Any], out: Path) -> None:
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise BadArgument(
                f"{name}: {out} was begun with {found.get(name)}, got {wanted.get(name)}; give another --out"
            )


def _claim(out: Path, column: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Makes `out` this command's, or checks that it is; the report where it is finished.

    Raises: BadArgument where it is somebody else's, or was begun with other arguments.
    """
    work, finished = out / WORK, out / f"{column}.json"
    try:
        if finished.is_file():
            report = json.loads(finished.read_text(encoding="utf-8"))
            _same(report["asked"], asked, out)
            shutil.rmtree(work, ignore_errors=True)
            return report
        if (work / "asked.json").is_file():
            _same(json.loads((work / "asked.json").read_text(encoding="utf-8")), asked, out)
            return None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BadArgument):
            raise
        raise BadArgument(f"out: {out} holds a {finished.name} of something else, want another folder") from None
    if out.exists() and (not out.is_dir() or any(path.name != WORK for path in out.iterdir())):
        raise BadArgument(f"out: wanted a new or empty folder, or one this command began, got {out}")
    work.mkdir(parents=True, exist_ok=True)
    replace_text(work / "asked.json", json.dumps(asked, indent=2) + "\n")
    return None


def rewrite(
    source: str | Path,
    out: str | Path,
    added: Added,
    asked: dict[str, Any],
    *,
    compression: str = "same",
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the prepared folder `source` into `out` with one column more; continues where a killed run stopped.

    asked: the arguments the result depends on; an `out` begun with others is refused. compression: same, none or zstd.
    Other files at the top of `source` are copied; quarantined samples are added to quarantine.jsonl. Returns what
    COLUMN.json holds: {"asked", "samples", "quarantined", "counts"}.

    Raises: BadArgument; BrokenShard naming a file that is not what its index says; OSError.
    """
    source, out = Path(source), Path(out)
    splits = find_splits(source)
    for name, index in splits.items():
        have = columns_of(index)
        if added.name in have or (added.drop is not None and have and added.drop not in have):
            column = f"{added.name!r} not to be there" if added.name in have else f"a column {added.drop!r}"
            raise BadArgument(f"column: wanted {column}, {source / name} has {', '.join(have)}")
    if (source / f"{added.name}.json").exists():
        raise BadArgument(f"column: wanted a name without a {added.name}.json in {source}, got {added.name!r}")
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise BadArgument(f"out: wanted a folder outside {source}, got {out}")
    digest = hashlib.sha256(b"".join((source / name / "index.json").read_bytes() for name in splits)).hexdigest()
    asked = {**asked, "compression": compression, "source_indexes": digest}
    report = _claim(out, added.name, asked)
    if report is not None:
        print(f"{added.name}: {out} is finished, {report['samples']} samples", file=sys.stderr)
        return report
    with alone(out / WORK / "lock", BadArgument(f"out: another process is writing {out}")):
        total = sum(shard["samples"] for index in splits.values() for shard in index["shards"])
        # None: no bar where stderr is not a terminal.
        with tqdm(total=total, desc=added.name, unit="sample", disable=None if progress else True) as bar:
            for name, index in splits.items():
                for folder in (out / name, out / WORK / name):
                    folder.mkdir(parents=True, exist_ok=True)
                for number, shard in enumerate(index["shards"]):
                    done = _entry(out, name, number)
                    if done.exists():
                        bar.update(shard["samples"])
                    else:
                        _one_shard(source / name, out, name, number, shard, added, compression, done, bar.update)
        report = _finish(source, out, added, splits, asked)
    shutil.rmtree(out / WORK)
    return report


def _entry(out: Path, name: str, number: int) -> Path:
    return out / WORK / name / f"{number:05d}.json"


def _one_shard(
    folder: Path, out: Path, name: str, number: int, shard: dict[str, Any], added: Added, compression: str, done: Path,
    tick: Tick,
) -> None:  # fmt: skip
    samples = read_shard(folder, shard)
    outcome = added.compute(f"{name}/{number:05d}", samples, tick)
    columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True)) | {added.name: added.encoding}
    if added.drop is not None:
        del columns[added.drop]
    rows = (sample | {added.name: value} for sample, value in zip(samples, outcome.values, strict=True))
    codec = {"same": shard["compression"], "none": None}.get(compression, compression)
    entry = _write_shard(out / WORK, out / name, number, columns, rows, codec)
    quarantined = [
        {"source": f"{name}/{shard['raw_data']['basename']}", "key": str(at), "reason": reason, "detail": detail}
        for at, reason, detail in outcome.quarantined
    ]
    state = {"entry": entry, "quarantined": quarantined, "counts": outcome.counts}
    replace_text(done, json.dumps(state) + "\n")


def _finish(
    source: Path, out: Path, added: Added, splits: dict[str, dict[str, Any]], asked: dict[str, Any]
) -> dict[str, Any]:
    """Other files, quarantine.jsonl, the indexes (train's last), and the report that says it is complete."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != "quarantine.jsonl":
            shutil.copyfile(path, out / f".{path.name}.partial")
            os.replace(out / f".{path.name}.partial", out / path.name)
    old = source / "quarantine.jsonl"
    lines = old.read_text(encoding="utf-8").splitlines(keepends=True) if old.is_file() else []
    reasons: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    indexes = {}
    for name, index in splits.items():
        entries = [_entry(out, name, number) for number in range(len(index["shards"]))]
        states = [json.loads(path.read_text(encoding="utf-8")) for path in entries]
        lines += [json.dumps(row) + "\n" for state in states for row in state["quarantined"]]
        reasons.update(row["reason"] for state in states for row in state["quarantined"])
        for state in states:
            counts.update(state["counts"])
        about = {} if added.metadata is None else {added.name: added.metadata}
        indexes[name] = {**index, **about, "shards": [state["entry"] for state in states]}
    if lines:
        replace_text(out / "quarantine.jsonl", "".join(lines))
    write_buckets(out, indexes)
    for name in sorted(indexes, key=lambda name: name.split("/")[0] == "train"):
        replace_text(out / name / "index.json", json.dumps(indexes[name], sort_keys=True))
    samples = sum(shard["samples"] for index in splits.values() for shard in index["shards"])
    report = {"asked": asked, "samples": samples, "quarantined": dict(reasons), "counts": dict(counts)}
    replace_text(out / f"{added.name}.json", json.dumps(report, indent=2) + "\n")
    return report
