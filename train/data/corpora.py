"""What a split is read from: one folder of shards, or several where there are aspect buckets or corpora are mixed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from train.config import ConfigError, DataConfig
from train.data.errors import DataError
from train.data.index import BUCKETS, INDEX, Index
from train.data.memory import clean_stale
from train.data.source import PROMPTS, Source, fetch_if_there, open_split, root, split
from train.distributed import Ranks

MOMENTS = "moments"
SIZE = r"([1-9]\d{0,4})x([1-9]\d{0,4})"  # of an aspect bucket's folder
Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Part:
    """One folder of shards whose images are all of one size.

    corpus: the path in the configuration. proportion: of an epoch's samples; None where all are taken once.
    """

    source: Source
    index: Index
    size: Size
    corpus: str
    proportion: float | None = None


def _bucket_names(source: Source) -> list[str]:
    """Folders of a split without an index of its own: those with an index, or of a store, which is not listed, those in
    its buckets.json. Raises: ConfigError for another buckets.json; DataError when the store does not answer.
    """
    base = source.remote or str(source.folder)
    if "://" not in base:
        return [] if (Path(base) / INDEX).is_file() else [path.parent.name for path in Path(base).glob(f"*/{INDEX}")]
    if fetch_if_there(source, INDEX) or (path := fetch_if_there(source, BUCKETS)) is None:
        return []
    try:
        names = json.loads(path.read_text())
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and re.fullmatch(SIZE, name) for name in names):
        raise ConfigError(f"data.path: wanted a list of folders WIDTHxHEIGHT in {source.at(BUCKETS)}")
    return names


def _folders(source: Source, side: int) -> list[tuple[Source, Size]]:
    """A split's folder, or those of its aspect buckets WIDTHxHEIGHT where it has no index of its own."""
    buckets = [match for name in set(_bucket_names(source)) if (match := re.fullmatch(SIZE, name))]
    if not buckets:
        return [(source, (side, side))]
    return [
        (
            replace(source, folder=source.folder / m[0], remote=f"{source.remote}/{m[0]}" if source.remote else None),
            (int(m[1]), int(m[2])),
        )
        for m in sorted(buckets, key=lambda m: (int(m[1]), int(m[2])))
    ]


def open_corpus(data: DataConfig, path: str, name: str, weight: float | None = None) -> list[Part]:
    """The parts of the split `name` of the corpus at `path`, their indexes checked; a weight is shared out by samples.

    Raises: ConfigError, also where a caption column is not there; DataError when a store does not answer.
    """
    folders = _folders(split(replace(data, path=path), name), data.image_size)
    parts = [Part(source, open_split(source, tuple(data.captions)), size, path) for source, size in folders]
    for part in parts:
        if not {"image", MOMENTS} & set(part.index.columns):
            raise ConfigError(
                f"data.path: wanted a column image or {MOMENTS} in {part.source}, got {', '.join(part.index.columns)}"
            )
    total = sum(part.index.samples for part in parts)
    return parts if weight is None else [replace(p, proportion=weight * p.index.samples / total) for p in parts]


def sizes(parts: Sequence[Part]) -> list[Size]:
    """The different image sizes."""
    return list(dict.fromkeys(part.size for part in parts))


def check_cache(data: DataConfig, parts: Sequence[Part]) -> None:
    """Raises: ConfigError where the cache cannot hold four of the largest shards."""
    largest = max(part.index.largest for part in parts)
    room = parts[0].source.cache_bytes
    if room is not None and room < 4 * largest:
        raise ConfigError(
            f"data.cache_gb: wanted room for four of the largest shards, {4 * largest / (1 << 30):.2g}, "
            f"got {data.cache_gb}"
        )


def open_data(data: DataConfig, ranks: Ranks) -> dict[str, list[Part]]:
    """Make the data ready on every node: stale shared memory removed, the indices of train and val checked, the store's
    prompts fetched. A collective call, before any streaming dataset is made.

    Returns: the parts of train and val.

    Raises: ConfigError or DataError, the same on all ranks.
    """

    def on_this_node() -> dict[str, list[Part]] | None:
        if ranks.local_rank != 0:
            return None
        clean_stale()
        train = [part for path, weight in data.mix.items() for part in open_corpus(data, path, "train", weight)]
        parts = {"train": train or open_corpus(data, data.path, "train"), "val": open_corpus(data, data.path, "val")}
        check_cache(data, parts["train"])
        if root(data).remote:
            fetch_if_there(root(data), PROMPTS)
        return parts

    opened = ranks.gather(ranks.together(on_this_node, DataError))
    found = [parts for parts in opened if parts is not None]
    if any(outcome != found[0] for outcome in found):
        raise ConfigError(f"data.path: wanted the same data on every node, the indices of {data.path} differ")
    return found[0]
