"""What is done with one unit: the first pass counts its rows and hashes its pictures, the second converts them."""

from __future__ import annotations

import heapq
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from train.disk import sync
from train.prepare.captions import CaptionOptions, check
from train.prepare.images import ImageOptions, render
from train.prepare.journal import HASH_BYTES, FirstCopies
from train.prepare.rejects import Broken, Rejected
from train.prepare.shards import rename, stored, writer
from train.prepare.sources import Bad, Row, Source, Unit

VAL_BITS = 63  # of a key's hash: SQLite's integers are signed


@dataclass(frozen=True)
class Job:
    """What all units share.

    Args:
        source: where the rows come from.
        columns: (column, field) of every caption, `caption` first.
        captions, images: what is taken, and what it becomes.
        buckets: a folder for every size.
        duplicates: drop or keep.
        compression: of the shards, as streaming names it, or None.
        shard_bytes: size of a shard before compression.
        val_keys: key hashes that the first pass must keep, the smallest.
    """

    source: Source
    columns: tuple[tuple[str, str], ...]
    captions: CaptionOptions
    images: ImageOptions
    buckets: bool
    duplicates: str
    compression: str | None
    shard_bytes: int
    val_keys: int


def key_hash(key: str) -> int:
    """A key's place in the draw for the validation split, evenly spread over [0, 2^63)."""
    return int.from_bytes(blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "big") >> 64 - VAL_BITS


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=HASH_BYTES).digest()


def _captions(row: Row, job: Job) -> tuple[dict[str, str], int]:
    """(text by column, how many were cut). Raises: Rejected."""
    checked = {column: check(row.captions.get(field), field, job.captions) for column, field in job.columns}
    return {column: text for column, (text, _) in checked.items()}, sum(cut for _, cut in checked.values())


def scan(job: Job, number: int, unit: Unit, tick: Callable[[int], None]) -> tuple[Any, ...]:
    """First pass. Returns (rows, smallest key hashes, (row, picture's hash) of those with usable captions)."""
    rows, keys, hashes = 0, set(), []  # type: int, set[int], list[tuple[int, bytes]]
    try:
        for at, row in enumerate(job.source.rows(unit)):
            rows = at + 1
            tick(1)
            if isinstance(row, Bad):
                continue
            try:
                _captions(row, job)
                if job.duplicates == "drop":
                    hashes.append((at, _digest(row.load())))
            except Rejected:
                continue
            keys.add(key_hash(row.key))
            if len(keys) > 2 * job.val_keys + 1024:
                keys = set(heapq.nsmallest(job.val_keys, keys))
    except Broken:
        pass  # listed by the second pass
    return rows, heapq.nsmallest(job.val_keys, keys), hashes


def convert(
    job: Job,
    number: int,
    unit: Unit,
    work: Path,
    first: FirstCopies | None,
    val_below: int,
    tick: Callable[[int], None],
) -> dict[str, Any]:
    """Second pass: a unit's shards and quarantine.jsonl in the empty folder `work`, on the disk when this returns.

    first: who has the first copy of a picture, None to keep copies. val_below: samples whose key's hash is at most this
    are for validation. Returns {"rows", "kept": {folder: samples}, "skipped": {reason: samples}, "broken": 0 or 1,
    "captions_cut", "bytes_in", "bytes_out", "shards": {folder: [index entries]}, "files": {folder: [names in work]}}.
    """
    writers: dict[str, Any] = {}
    kept: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    rows = cut = bytes_in = broken = 0
    with open(work / "quarantine.jsonl", "w", encoding="utf-8") as quarantine:

        def put_aside(key: str | None, reason: str, detail: str) -> None:
            record = {"source": unit.path, "key": key, "reason": reason, "detail": detail[:500]}
            quarantine.write(json.dumps(record) + "\n")

        try:
            for at, row in enumerate(job.source.rows(unit)):
                rows = at + 1
                try:
                    if isinstance(row, Bad):
                        raise row.why
                    texts, cuts = _captions(row, job)
                    data = row.load()
                    bytes_in += len(data)
                    if first is not None:
                        other = first.of(_digest(data))
                        if other != (number, at):
                            raise Rejected("duplicate", f"the same file as row {other[1]} of unit {other[0]}")
                    picture = render(data, job.images)
                except Rejected as why:
                    skipped[why.reason] += 1
                    put_aside(row.key, why.reason, why.detail)
                    continue
                finally:
                    tick(1)
                folder = "val" if key_hash(row.key) <= val_below else "train"
                if job.buckets:
                    folder += "/{}x{}".format(*picture.size)
                if folder not in writers:
                    extra = [column for column, _ in job.columns[1:]]
                    writers[folder] = writer(work / folder, extra, job.compression, job.shard_bytes)
                meta = {"source": unit.path, "key": row.key, "size": list(picture.original)}
                if row.url is not None:
                    meta["url"] = row.url
                writers[folder].write({"image": picture.data, **texts, "meta": meta})
                kept[folder] += 1
                cut += cuts
        except Broken as why:
            broken = 1
            put_aside(None, "source_broken", f"{why}; the {rows} rows before are kept")
        quarantine.flush()
        os.fsync(quarantine.fileno())
    shards, files = {}, {}
    for folder, out in writers.items():
        out.finish()
        for entry in out.shards:
            sync(work / folder / stored(entry)["basename"])
        files[folder] = [stored(entry)["basename"] for entry in out.shards]
        shards[folder] = [rename(entry, f"shard.{number:06}.{i:04}") for i, entry in enumerate(out.shards)]
    return {
        "rows": rows,
        "kept": dict(kept),
        "skipped": dict(skipped),
        "broken": broken,
        "captions_cut": cut,
        "bytes_in": bytes_in,
        "bytes_out": sum(stored(entry)["bytes"] for entries in shards.values() for entry in entries),
        "shards": shards,
        "files": files,
    }
