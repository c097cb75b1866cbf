"""MDS shards of a unit, and one folder's shards of all units put in order under one index.json.

A folder is a split, train/ or val/, or with aspect buckets train/WxH/. Shards keep the name of their unit, so that who
worked on it and when does not show.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from train.disk import replace_text, sync

BASE_COLUMNS = {"image": "bytes", "caption": "str", "meta": "json"}


def writer(folder: Path, columns: Iterable[str], compression: str | None, size_limit: int, raw: bool = False) -> Any:
    """A writer of the base columns and further `columns` of text, with SHA-256 hashes.

    raw: its samples are bytes that `raw_samples` gave.
    """
    from streaming import MDSWriter  # imports torch: only those who write wait for it

    out: Any = MDSWriter(
        out=str(folder),
        columns={**BASE_COLUMNS, **dict.fromkeys(columns, "str")},
        compression=compression,
        hashes=["sha256"],
        size_limit=size_limit,
        max_workers=1,
    )
    if raw:
        out.encode_sample = bytes
    return out


def stored(shard: dict[str, Any]) -> dict[str, Any]:
    """The part of a shard's index entry that describes the file on disk."""
    return shard["zip_data"] or shard["raw_data"]


def rename(shard: dict[str, Any], stem: str) -> dict[str, Any]:
    """An index entry with `stem` in place of what stands before .mds in its names."""
    renamed = dict(shard)
    for part in ("raw_data", "zip_data"):
        if shard[part]:
            name = shard[part]["basename"]
            renamed[part] = {**shard[part], "basename": stem + name[name.index(".mds") :]}
    return renamed


def raw_samples(folder: Path, shard: dict[str, Any]) -> Iterable[bytes]:
    """The samples of a shard as MDS encodes them, in order."""
    from streaming.base.compression import decompress

    data = (folder / stored(shard)["basename"]).read_bytes()
    if shard["zip_data"]:
        data = decompress(shard["compression"], data)
    count = int(np.frombuffer(data, np.uint32, 1)[0])
    edges = np.frombuffer(data, np.uint32, count + 1, offset=4)
    return (data[a:b] for a, b in pairwise(edges))


def _merge(folder: Path, work: Path, shards: list[dict[str, Any]], columns: Iterable[str]) -> dict[str, Any]:
    """Neighbouring small shards as one, in `folder`."""
    out = writer(work, columns, shards[0]["compression"], shards[0]["size_limit"], raw=True)
    for shard in shards:
        for sample in raw_samples(folder, shard):
            out.write(sample)
    out.finish()
    (made,) = out.shards
    merged = rename(made, "merged." + stored(shards[0])["basename"].split(".mds")[0])
    sync(work / stored(made)["basename"])
    os.replace(work / stored(made)["basename"], folder / stored(merged)["basename"])
    (work / "index.json").unlink()
    return merged


def finish_folder(
    folder: Path, work: Path, shards: list[dict[str, Any]], columns: Iterable[str], tick: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Join small neighbours and write index.json; deletes nothing, so that it may be repeated after a kill.

    shards: index entries in order; `work` an empty folder; `tick` is told of shards passed. Returns the index's
    entries. Memory: three shards.
    """
    kept: list[dict[str, Any]] = []
    run: list[dict[str, Any]] = []

    def close() -> None:
        if run:
            kept.append(_merge(folder, work, run, columns) if len(run) > 1 else run[0])
        tick(len(run))
        run.clear()

    for shard in shards:
        if sum(s["raw_data"]["bytes"] for s in [*run, shard]) > shard["size_limit"]:
            close()
        run.append(shard)
    close()
    sync(folder)
    replace_text(folder / "index.json", json.dumps({"version": 2, "shards": kept}, sort_keys=True))
    return kept


def write_buckets(out: Path, folders: Iterable[str]) -> None:
    """SPLIT/buckets.json: the names of a split's aspect buckets, of all `folders` (train, or train/256x192).

    Stores are read without being listed.
    """
    from train.data.index import BUCKETS  # imports torch

    buckets: dict[str, list[str]] = {}
    for split, _, bucket in (folder.partition("/") for folder in sorted(folders)):
        if bucket:
            buckets.setdefault(split, []).append(bucket)
    for split, names in buckets.items():
        replace_text(out / split / BUCKETS, json.dumps(names))


def remove_others(folder: Path, shards: Iterable[dict[str, Any]]) -> None:
    """Delete the shard files in `folder` that are none of `shards`."""
    known = {stored(shard)["basename"] for shard in shards}
    for path in folder.iterdir():
        if ".mds" in path.name and path.name not in known:
            path.unlink()
