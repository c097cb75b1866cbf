"""What is done with one unit: the first pass counts its rows and hashes its pictures, the second converts them."""

from __future__ import annotations

import heapq
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
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

VAL_BITS = 63  # of a row's hash: SQLite's integers are signed


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
        val_rows: rows that may be drawn for validation by their number; 0 where a share is.
    """

    source: Source
    columns: tuple[tuple[str, str], ...]
    captions: CaptionOptions
    images: ImageOptions
    buckets: bool
    duplicates: str
    compression: str | None
    shard_bytes: int
    val_rows: int


def file_names(files: Sequence[str]) -> dict[str, str]:
    """What each file is called in the draw: its base name, the same in any folder, and how many such came before."""
    names, seen = {}, Counter()  # type: dict[str, str], Counter[str]
    for path in files:
        base = os.path.basename(path)
        names[path] = f"{base}\0{seen[base]}"
        seen[base] += 1
    return names


def row_hash(file: str, key: str, place: str) -> int:
    """A row's place in the draw for the validation split, evenly spread over [0, 2^63); keys alone may start again."""
    identity = f"{file}\0{key}\0{place}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(identity, digest_size=8).digest(), "big") >> 64 - VAL_BITS


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=HASH_BYTES).digest()


def _captions(row: Row, job: Job) -> tuple[dict[str, str], int]:
    """(text by column, how many were cut). Raises: Rejected."""
    checked = {column: check(row.captions.get(field), field, job.captions) for column, field in job.columns}
    return {column: text for column, (text, _) in checked.items()}, sum(cut for _, cut in checked.values())


def scan(job: Job, file: str, unit: Unit, tick: Callable[[int], None]) -> tuple[Any, ...]:
    """First pass; `file` is what `file_names` calls the unit's file.

    Returns (rows, smallest row hashes, (row, picture's hash) of those with usable captions).
    """
    rows, drawn, hashes = 0, [], []  # type: int, list[int], list[tuple[int, bytes]]
    most = job.val_rows + 1  # one more, to see that a hash is of too many rows
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
            drawn.append(row_hash(file, row.key, row.place))
            if len(drawn) > 2 * most + 1024:
                drawn = heapq.nsmallest(most, drawn)
    except Broken:
        pass  # listed by the second pass
    return rows, heapq.nsmallest(most, drawn), hashes


def convert(
    job: Job,
    file: str,
    number: int,
    unit: Unit,
    work: Path,
    first: FirstCopies | None,
    val_below: int,
    tick: Callable[[int], None],
) -> dict[str, Any]:
    """Second pass: a unit's shards and quarantine.jsonl in the empty folder `work`, on the disk when this returns.

    file: what `file_names` calls the unit's file. first: who has the first copy of a picture, None to keep copies.
    val_below: rows whose hash is at most this are for validation. Returns {"rows", "kept": {folder: samples},
    "skipped": {reason: samples}, "broken": 0 or 1, "captions_cut", "bytes_in", "bytes_out", "shards": {folder: [index
    entries]}, "files": {folder: [names in work]}}.
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
                        if other is None:
                            raise Rejected("image_changed", "not as the first pass read it")
                        if other != (number, at):
                            raise Rejected("duplicate", f"the same file as row {other[1]} of unit {other[0]}")
                    picture = render(data, job.images)
                except Rejected as why:
                    skipped[why.reason] += 1
                    put_aside(row.key, why.reason, why.detail)
                    continue
                finally:
                    tick(1)
                folder = "val" if row_hash(file, row.key, row.place) <= val_below else "train"
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
