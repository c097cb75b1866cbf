"""Where the splits are read from: a folder, or an object store with a folder that keeps what was fetched."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streaming.base.storage import CloudDownloader

from train.config import ConfigError, DataConfig
from train.data.errors import DataError, plain
from train.data.index import COLUMNS, INDEX, Index, read_index

PROMPTS = "prompts.jsonl"
ATTEMPTS, TIMEOUT = 3, 60.0  # of fetching a file; seconds until an answer begins
HOPELESS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
}
NOT_THERE = {"403", "404", "AccessDenied", "NoSuchKey"}  # a store may hide that it has no such file
REFUSED = NOT_THERE | {"400", "401", "InvalidAccessKeyId", "NoSuchBucket", "SignatureDoesNotMatch"}


@dataclass(frozen=True)
class Source:
    """Where one split is.

    folder: what is read. remote: where what is missing in `folder` is fetched from; None where all is there.
    cache_bytes: most that `folder` may hold, shards used longest ago are dropped for others; None without a limit.
    """

    folder: Path
    remote: str | None = None
    cache_bytes: int | None = None

    def __str__(self) -> str:
        return self.remote or str(self.folder)

    def at(self, name: str) -> str:
        """Where a file of the split comes from, for messages."""
        return f"{self.remote}/{name}" if self.remote else str(self.folder / name)


def root(data: DataConfig) -> Source:
    """The place of the splits' folders."""
    if "://" not in data.path and data.cache is None:
        return Source(Path(data.path))
    remote = data.path.rstrip("/")
    base = os.environ.get("SEMANTIC_ROUTING_CACHE") or Path.home() / ".cache" / "semantic-routing"
    cache = Path(data.cache) if data.cache else Path(base) / "shards"
    key = hashlib.sha256(remote.encode()).hexdigest()[:16]  # another store's shards may have the same names
    return Source(cache / key, remote, round(data.cache_gb * (1 << 30)) if data.cache_gb else None)


def split(data: DataConfig, name: str) -> Source:
    """The split `name`; the limit of the cache holds for the training split, whose shards come and go."""
    base = root(data)
    remote = f"{base.remote}/{name}" if base.remote else None
    return Source(base.folder / name, remote, base.cache_bytes if name == "train" else None)


def answer(error: BaseException | None) -> str | None:
    """The code with which a store refused, where it did."""
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def partial_name(path: Path) -> Path:
    """A name beside `path` that no other process takes, on whatever machine: a cache may be everybody's."""
    return path.with_name(f"{path.name}.part-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")


def attempt(what: str, fetch: Callable[[], Any]) -> Any:
    """`fetch()`, again after a while when it fails in a way that may pass.

    Raises: DataError with `what` when it failed ATTEMPTS times, or for good.
    """
    for tried in range(1, ATTEMPTS + 1):
        try:
            return fetch()
        except Exception as error:  # every store's client has its own
            final = answer(error) in REFUSED or (isinstance(error, OSError) and error.errno in HOPELESS)
            if final or tried == ATTEMPTS:
                times = "" if final else f" ({tried} attempts)"
                raise DataError(f"{what}: {plain(error)}{times}") from error
            time.sleep(2.0 ** (tried - 1))


def fetch_file(source: Source, name: str) -> Path:
    """Fetch a small file of the store anew, whole or not at all. Raises: DataError."""
    path = source.folder / name
    part = partial_name(path)
    try:
        attempt(source.at(name), lambda: CloudDownloader.direct_download(source.at(name), str(part), TIMEOUT))
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path


def open_split(source: Source, columns: tuple[str, ...] = COLUMNS) -> Index:
    """The split's index, checked; from a store it is fetched anew, so that no older one in the cache is used.

    Raises: ConfigError naming what is wrong with it; DataError when the store does not answer.
    """
    if source.remote:
        try:
            fetch_file(source, INDEX)
        except DataError as error:
            if not_there(error) or answer(error.__cause__) in REFUSED:
                raise ConfigError(f"data.path: {error}") from None
            raise
    return read_index(source.folder, columns)


def fetch_if_there(source: Source, name: str) -> Path | None:
    """`fetch_file`; None, and no older one in the cache, where the store has none or does not show it."""
    try:
        return fetch_file(source, name)
    except DataError as error:
        if not not_there(error):
            raise
        (source.folder / name).unlink(missing_ok=True)
        return None


def not_there(error: DataError) -> bool:
    """Whether a store answered that it has no such file, or that it is not for us."""
    return isinstance(error.__cause__, FileNotFoundError) or answer(error.__cause__) in NOT_THERE
