"""A split's index.json, checked before streaming sees it: names stay inside, encodings are harmless, sizes sane."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import ConfigError

INDEX, BUCKETS = "index.json", "buckets.json"
COLUMNS = ("caption",)  # what training cannot do without, beside image or moments
NUMBER = r"u?int(8|16|32|64)|float(16|32|64)"
ENCODING = re.compile(rf"bytes|str|json|int|{NUMBER}|ndarray(:({NUMBER})(:\d+(,\d+)*)?)?")  # never pkl: it runs code
COMPRESSION = re.compile(r"(zstd|gz|bz2)(:\d+)?")  # those that can be undone with a bound
LARGEST = (1 << 32) - 1  # offsets in a shard are 32-bit
LARGEST_COMPRESSED = 1 << 30  # undone in memory
HASHES = {"sha1": 40, "sha224": 56, "sha256": 64, "sha384": 96, "sha512": 128, "md5": 32, "blake2b": 128, "blake2s": 64}
SHARD_KEYS = {
    "version", "format", "column_names", "column_encodings", "column_sizes", "compression", "hashes", "raw_data",
    "samples", "size_limit", "zip_data",
}  # fmt: skip


@dataclass(frozen=True)
class Index:
    """What a split holds.

    columns: encoding by name. bytes: of all shards, not compressed. largest: bytes of the largest shard, with its
    compressed form. hashed: every file's hash is known. encoder: fingerprint of the VAE's encoder that made the
    column moments, where there is one.
    """

    samples: int
    shards: int
    columns: dict[str, str]
    bytes: int
    largest: int
    hashed: bool
    encoder: str | None = None


def read_index(folder: Path, columns: tuple[str, ...] = COLUMNS) -> Index:
    """Check the index of the split in `folder`, and that no file it names there is a link that leads out.

    columns: those the split must have.

    Raises: ConfigError naming the file and the key.
    """
    path = folder / INDEX
    try:
        plain = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"data.path: wanted a readable {path}: {error}") from None
    index, names = check_index(plain, str(path), columns)
    root = folder.resolve()
    for name in names:
        if not (folder / name).resolve().is_relative_to(root):
            raise ConfigError(
                f"data.path: {path}: wanted files inside its folder, {name} is a link that leads out of it"
            )
    return index


def check_index(plain: Any, where: str, columns: tuple[str, ...] = COLUMNS) -> tuple[Index, list[str]]:
    """The index and the files it names, from its parsed JSON. Raises: ConfigError naming `where` and the key."""

    def want(ok: bool, key: str, wanted: str, got: Any) -> None:
        if not ok:
            text = repr(got)
            raise ConfigError(f"data.path: {where}: {key}: wanted {wanted}, got {text[:60]}")

    def whole(value: Any, key: str, low: int, high: int) -> int:
        good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        want(good, key, f"a whole number from {low:,} to {high:,}", value)
        return int(value)

    def file(value: Any, key: str, high: int) -> tuple[str, int, bool]:
        keys = {"basename", "bytes", "hashes"}
        want(isinstance(value, dict) and set(value) == keys, key, "an object of basename, bytes and hashes", value)
        want(inside(value["basename"]), f"{key}.basename", "a file name inside the folder", value["basename"])
        hashes = value["hashes"]
        want(isinstance(hashes, dict), f"{key}.hashes", "an object", hashes)
        for name, digest in hashes.items():
            good = isinstance(digest, str) and re.fullmatch(r"[0-9a-f]+", digest)
            want(bool(good), f"{key}.hashes.{name}", "hexadecimal digits", digest)
            want(
                len(digest) == HASHES.get(name, len(digest)),
                f"{key}.hashes.{name}",
                f"{HASHES.get(name)} digits",
                digest,
            )
        return value["basename"], whole(value["bytes"], f"{key}.bytes", 1, high), any(n in HASHES for n in hashes)

    want(isinstance(plain, dict), "", "an object", plain)
    want(plain.get("version") == 2, "version", "2", plain.get("version"))
    shards = plain.get("shards")
    want(isinstance(shards, list) and bool(shards), "shards", "a list of at least one shard", shards)
    names: list[str] = []
    samples, size, largest, hashed, first = 0, 0, 0, True, None
    for i, shard in enumerate(shards):
        at = f"shards[{i}]"
        want(
            isinstance(shard, dict) and set(shard) == SHARD_KEYS,
            at,
            f"an object of {', '.join(sorted(SHARD_KEYS))}",
            shard,
        )
        want(shard["version"] == 2, f"{at}.version", "2", shard["version"])
        want(shard["format"] == "mds", f"{at}.format", "'mds'", shard["format"])
        lists = [shard[f"column_{part}"] for part in ("names", "encodings", "sizes")]
        same = all(isinstance(part, list) for part in lists) and len({len(part) for part in lists}) == 1
        want(same, f"{at}.column_names", "as many names as encodings and sizes", lists[0])
        for name, encoding, fixed in zip(*lists, strict=True):
            want(isinstance(name, str), f"{at}.column_names", "strings", name)
            good = isinstance(encoding, str) and ENCODING.fullmatch(encoding)
            want(
                bool(good), f"{at}.column_encodings", f"bytes, str, json, a number or an ndarray for {name!r}", encoding
            )
            if fixed is not None:
                whole(fixed, f"{at}.column_sizes", 0, LARGEST)
        kinds = dict(zip(*lists[:2], strict=True))
        want(len(kinds) == len(lists[0]), f"{at}.column_names", "different names", lists[0])
        first = kinds if first is None else first
        want(kinds == first, f"{at}.column_encodings", "the columns of the first shard", kinds)
        limit = shard["size_limit"]
        good = limit is None or (isinstance(limit, int) and limit >= 0) or re.fullmatch(r"\d+([kmgt]?b)?", str(limit))
        want(bool(good), f"{at}.size_limit", "a number of bytes or null", limit)
        count = whole(shard["samples"], f"{at}.samples", 1, LARGEST // 4)
        compression = shard["compression"]
        known: Any = compression is None or (isinstance(compression, str) and COMPRESSION.fullmatch(compression))
        want(bool(known), f"{at}.compression", "null, zstd, gz or bz2", compression)
        want(
            (shard["zip_data"] is None) == (compression is None),
            f"{at}.zip_data",
            "one if compressed",
            shard["zip_data"],
        )
        files = [file(shard["raw_data"], f"{at}.raw_data", LARGEST if compression is None else LARGEST_COMPRESSED)]
        least = 4 * (count + 2)
        want(files[0][1] >= least, f"{at}.raw_data.bytes", f"at least {least:,} for {count:,} samples", files[0][1])
        if shard["zip_data"] is not None:
            files.append(file(shard["zip_data"], f"{at}.zip_data", LARGEST))
        names += [name for name, _, _ in files]
        samples, size, largest = samples + count, size + files[0][1], max(largest, sum(n for _, n, _ in files))
        hashed = hashed and all(known for _, _, known in files)
    name, times = Counter(names).most_common(1)[0]
    want(times == 1, "shards", "different files", name)
    for name in columns:
        want(name in (first or {}), "shards[0].column_names", f"a column {name!r}", sorted(first or {}))
    about = plain.get("moments")
    encoder = about.get("encoder") if isinstance(about, dict) else None
    return Index(samples, len(shards), first or {}, size, largest, hashed, encoder), names


def inside(name: Any) -> bool:
    """Whether a file name is relative, stays inside its folder, and is no index."""
    if not isinstance(name, str) or re.search(r"[\\\x00-\x1f:]", name):
        return False
    return all(part not in ("", ".", "..") for part in name.split("/")) and name.split("/")[-1] != INDEX
