"""Samples from JSON lines: an image path and captions in every line; plain, .gz or .zst, read as a bounded stream."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.prepare.rejects import Broken, Rejected
from train.prepare.sources import UNIT_ROWS, Bad, Row, Unit, read_image, text_or_none
from train.shapes.corpus import BadArgument

BLOCK = 1 << 16  # bytes read at a time; what a broken stream loses before its break
LONGEST_LINE = 16 << 20  # bytes; longer lines are left out, and never held
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zstd", ".ndjson")


class BadLine(Exception):
    """A line that is too long to be held."""


def _open(path: str) -> Any:
    """A stream of the file's decompressed bytes. Raises: BadArgument where pyarrow is needed and missing."""
    if path.endswith((".zst", ".zstd")):
        try:
            import pyarrow
        except ImportError:
            raise BadArgument("input: reading .zst needs pyarrow: pip install 'semantic-routing[prepare]'") from None
        return pyarrow.input_stream(path, compression="zstd")
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def lines(path: str, start: int = 0) -> Iterator[tuple[int, bytes | None]]:
    """(offset of the line in decompressed bytes, its bytes without the newline; None where it is too long).

    Memory: one block and the longest line. Raises: Broken where the stream cannot be read on.
    """
    try:
        with _open(path) as stream:
            skip = start
            if isinstance(stream, io.BufferedReader):
                stream.seek(start)
                skip = 0
            at, held, dropped = start, bytearray(), 0
            while block := stream.read(BLOCK):  # the same blocks from any start, so that a break shows at the same line
                if skip:
                    block, skip = block[skip:], max(0, skip - len(block))
                *full, rest = block.split(b"\n")
                for part in full:
                    size = dropped + len(held) + len(part)
                    whole = bool(dropped) or size > LONGEST_LINE
                    yield at, None if whole else bytes(held + part)
                    at, dropped = at + size + 1, 0
                    held.clear()
                if dropped or len(held) + len(rest) > LONGEST_LINE:
                    dropped += len(held) + len(rest)
                    held.clear()
                else:
                    held += rest
            if held or dropped:
                yield at, None if dropped else bytes(held)
    except (OSError, EOFError, zlib.error) as error:  # pyarrow's errors are OSErrors
        raise Broken(f"{type(error).__name__}: {error}") from None


@dataclass(frozen=True)
class Jsonl:
    """JSON lines.

    Args:
        files: the files.
        root: folder that image paths are relative to and must stay in; None: each file's own folder.
        image: field of the image's path.
        key: field that identifies a sample; None: the image's path.
        fields: caption fields.
        max_bytes: size an image file may have.
    """

    files: tuple[str, ...]
    root: str | None
    image: str
    key: str | None
    fields: tuple[str, ...]
    max_bytes: int

    def units(self, tick: Callable[[int], None]) -> Iterator[Unit]:
        """Runs of UNIT_ROWS lines; start and stop are offsets in decompressed bytes.

        A compressed file can only be read from its front, so it has at most 64 units.
        """
        for path in self.files:
            edges, last, count = [0], 0, 0
            try:
                for count, (offset, _) in enumerate(lines(path), 1):
                    if count > 1 and (count - 1) % UNIT_ROWS == 0:
                        edges.append(offset)
                        tick(offset - last)
                        last = offset
            except Broken:
                pass  # met again by the last unit's rows, and listed then
            if not path.endswith((".jsonl", ".ndjson")) and len(edges) > 64:
                edges = [edges[i * len(edges) // 64] for i in range(64)]
            if count or os.path.getsize(path):
                yield from (Unit(path, a, b) for a, b in zip(edges, [*edges[1:], None], strict=True))

    def rows(self, unit: Unit) -> Iterator[Row | Bad]:
        """A row a line; blank lines are none."""
        for offset, line in lines(unit.path, unit.start):
            if unit.stop is not None and offset >= unit.stop:
                return
            if line is None:
                yield Bad(f"byte {offset}", Rejected("row_long", f"wanted lines of at most {LONGEST_LINE} bytes"))
            elif line.strip():
                yield self._row(line, unit.path, f"byte {offset}")

    def _row(self, line: bytes, path: str, where: str) -> Row | Bad:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            return Bad(where, Rejected("row_not_json", f"{type(error).__name__}: {error}"))
        if not isinstance(record, dict):
            return Bad(where, Rejected("row_not_json", f"wanted an object, got {type(record).__name__}"))
        image = record.get(self.image)
        if not isinstance(image, str) or not image:
            there = ", ".join(list(record)[:20])
            return Bad(where, Rejected("row_field", f"wanted a path in {self.image!r}; the line has {there}"))
        key = image if self.key is None else record.get(self.key)
        if not isinstance(key, str | int):
            return Bad(where, Rejected("row_field", f"wanted a text or number in {self.key!r}"))
        root = os.path.abspath(self.root or Path(path).parent)
        full = os.path.normpath(os.path.join(root, image))

        def load() -> bytes:
            if os.path.commonpath([root, full]) != root:
                raise Rejected("image_outside", f"{image} is not under {root}; --root widens it")
            return read_image(full, self.max_bytes)

        captions = {field: record.get(field) for field in self.fields}
        return Row(str(key), load, captions, text_or_none(record.get("url")), image)
