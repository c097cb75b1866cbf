"""Shards compared with the index before a sample of them is read: once a run on every node, fetched again when bad.

streaming itself looks at hashes only after a download.
"""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstd
from streaming import Stream
from streaming.base.format import FileInfo, Reader

from train.data.errors import DataError
from train.data.index import HASHES
from train.data.source import ATTEMPTS, TIMEOUT, Source, attempt, partial_name

BLOCK = 1 << 22
LEFT_BEHIND = 3600.0  # seconds without a change after which a partial file is nobody's


def fault(path: Path, info: FileInfo) -> str | None:
    """What is wrong with a file, in a few words; None where it is what the index says."""
    try:
        size = path.stat().st_size
        if size != info.bytes:
            return f"has {size:,} bytes, wanted {info.bytes:,}"
        name = best_hash(info)
        if name is None:
            return None
        digest = hashlib.new(name)
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest.hexdigest() == info.hashes[name] else f"is not what was written ({name} differs)"


def wrong_hash(data: bytes, info: FileInfo) -> str | None:
    """The name of the hash that data fails; None where it is what the index says."""
    name = best_hash(info)
    return None if name is None or hashlib.new(name, data).hexdigest() == info.hashes[name] else name


def best_hash(info: FileInfo) -> str | None:
    """The strongest hash the index knows of a file."""
    return max((name for name in info.hashes if name in HASHES), key=lambda name: HASHES[name], default=None)


def zstd_frame(data: bytes) -> int:
    """Content size that a Zstandard file of exactly one frame declares. Raises: ValueError for any other."""
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 6:
        raise ValueError("no Zstandard frame")
    flags = data[4]
    single, size_width = bool(flags & 0x20), (1 if flags & 0x20 else 0, 2, 4, 8)[flags >> 6]
    at = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    if not size_width:
        raise ValueError("a frame that does not tell its size")
    content = int.from_bytes(data[at : at + size_width], "little") + (256 if size_width == 2 else 0)
    at += size_width
    last = False
    while not last:  # what follows the frame would be undone as well, whatever this one declares
        if at + 3 > len(data):
            raise ValueError("a frame cut short")
        head = int.from_bytes(data[at : at + 3], "little")
        last, at = bool(head & 1), at + 3 + (1 if head >> 1 & 3 == 1 else head >> 3)
    if at + 4 * (flags >> 2 & 1) != len(data):
        raise ValueError("more or less than one frame")
    return content


def undo(data: bytes, compression: str, size: int) -> bytes:
    """Decompress to exactly `size` bytes and never more. Raises: ValueError, or the library's own error."""
    kind = compression.partition(":")[0]
    if kind == "zstd":
        if (declared := zstd_frame(data)) != size:
            raise ValueError(f"unpacks to {declared:,} bytes, wanted {size:,}")
        return zstd.decompress(data)
    unpack: Any = bz2.BZ2Decompressor() if kind == "bz2" else zlib.decompressobj(31)
    result = unpack.decompress(data, size + 1)
    if len(result) != size or not unpack.eof:
        raise ValueError(f"unpacks to {'more' if len(result) > size else 'less'} than {size:,} bytes")
    return result


class VerifiedStream(Stream):
    """A split whose shards are whole before they are opened.

    `prepare_shard` runs for every shard of a run once on a node, also where the file is there already.
    """

    def __init__(self, source: Source, proportion: float | None = None) -> None:
        super().__init__(
            remote=source.remote, local=str(source.folder), download_timeout=TIMEOUT, proportion=proportion
        )
        self.source = source

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: Any) -> None:
        """Drop what ended runs left half done in the cache, and count the rest; nothing is trusted yet."""
        if self.remote:
            for part in self.source.folder.rglob("*.part-*"):
                with contextlib.suppress(FileNotFoundError):  # another run looks too
                    if time.time() - part.stat().st_mtime > LEFT_BEHIND:
                        part.unlink()
        for i, shard in enumerate(shards):
            cache_usage_per_shard[i] = self.held(shard)

    def held(self, shard: Reader) -> int:
        """Bytes of the shard's files that are there."""
        files = [info for pair in shard.file_pairs for info in pair if info is not None]
        return sum(info.bytes for info in files if (self.source.folder / info.basename).is_file())

    def prepare_shard(self, shard: Reader) -> int:
        """Make sure that the shard is there and whole. Returns: change in bytes held.

        Raises: DataError naming the file and what is wrong with it.
        """
        before = self.held(shard)
        for raw, packed in shard.file_pairs:
            self._prepare(raw, packed, shard.compression or "")
        return self.held(shard) - before

    def _prepare(self, raw: FileInfo, packed: FileInfo | None, compression: str) -> None:
        path = self.source.folder / raw.basename
        wrong = fault(path, raw)
        if wrong is None:
            return
        if self.remote:
            with self._fetched(packed or raw) as part:
                if packed is None:
                    self._put(part, path)
                else:
                    self._unpack(part, self.source.at(packed.basename), path, raw, compression)
            return
        if packed is None:
            raise DataError(f"{path} {wrong}")
        zipped = self.source.folder / packed.basename
        if wrong := fault(zipped, packed):
            raise DataError(f"{zipped} {wrong}")
        self._unpack(zipped, str(zipped), path, raw, compression)

    @contextlib.contextmanager
    def _fetched(self, info: FileInfo) -> Iterator[Path]:
        """A partial file of this process's own that is what the index says. Raises: DataError after ATTEMPTS."""
        path = self.source.folder / info.basename
        part, where, wrong = partial_name(path), self.source.at(info.basename), None
        try:
            for _ in range(ATTEMPTS):
                part.unlink(missing_ok=True)
                try:
                    attempt(where, lambda: self._downloader.download(where, str(part), TIMEOUT))
                finally:
                    self._downloader.clean_up()
                if (wrong := fault(part, info)) is None:
                    break
            else:
                raise DataError(f"{where} {wrong} ({ATTEMPTS} attempts)")
            yield part
        finally:
            with contextlib.suppress(OSError):
                part.unlink()

    @staticmethod
    def _put(part: Path, path: Path) -> None:
        """Give a partial file its name. Raises: DataError."""
        try:
            os.replace(part, path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error

    def _unpack(self, zipped: Path, where: str, path: Path, raw: FileInfo, compression: str) -> None:
        """Undo a file's compression; `where` it came from, for messages. Raises: DataError."""
        part = partial_name(path)
        try:
            part.write_bytes(undo(zipped.read_bytes(), compression, raw.bytes))
            if wrong := fault(part, raw):
                raise DataError(f"{where} unpacked {wrong}")
            self._put(part, path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        except DataError:
            raise
        except Exception as error:  # zstd, zlib and bz2 have their own
            raise DataError(f"{where} cannot be unpacked: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
