"""What every source of samples gives: units of work, and the rows of a unit.

A source (jsonl.Jsonl, webdataset.Webdataset, parquet.Parquet) is a frozen dataclass with `files`, `units()` and
`rows(unit)`. A unit is converted, committed and, after a kill, repeated as a whole.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from train.prepare.rejects import Rejected
from train.shapes.corpus import BadArgument

UNIT_ROWS = 4096  # rows of a unit, where the source lets us choose


class Unit(NamedTuple):
    """A part of a source file. What `start` and `stop` count is the source's own; stop None: to the end."""

    path: str
    start: int
    stop: int | None


@dataclass(frozen=True)
class Row:
    """A sample before anything is checked: `load` reads the image file and may raise Rejected.

    place: tells it from other samples of its file with the same key, however the file is cut into units.
    """

    key: str
    load: Callable[[], bytes]
    captions: dict[str, Any]
    url: str | None = None
    place: str = ""


@dataclass(frozen=True)
class Bad:
    """A sample that cannot even be read as a row."""

    key: str
    why: Rejected


class Source(Protocol):
    """A kind of input."""

    @property
    def files(self) -> tuple[str, ...]:
        """The input files, in order."""
        ...

    def units(self, tick: Callable[[int], None]) -> Iterator[Unit]:
        """The units of all files in order; `tick` is told of bytes passed. Raises: BadArgument."""
        ...

    def rows(self, unit: Unit) -> Iterator[Row | Bad]:
        """The same rows at every call. Raises: Broken where the file cannot be read on."""
        ...


def expand(name: str, paths: Sequence[str], suffixes: tuple[str, ...]) -> tuple[str, ...]:
    """Files as they are, folders as their files of these suffixes (recursive), sorted.

    Raises: BadArgument where a path is not there or a folder holds none.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(str(p) for p in path.rglob("*") if p.name.endswith(suffixes) and p.is_file())
            if not inside:
                raise BadArgument(f"{name}: wanted files *{', *'.join(suffixes)} in {path}, found none")
            found += inside
        elif path.is_file():
            found.append(str(path))
        else:
            raise BadArgument(f"{name}: wanted a file or folder, found none at {path}")
    return tuple(dict.fromkeys(found))


def read_image(path: str, limit: int) -> bytes:
    """A regular file of at most `limit` bytes. Raises: Rejected."""
    try:
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:  # a FIFO would wait
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise Rejected("image_missing", f"{path} is not a regular file")
            too_large(state.st_size, limit)
            return file.read(limit)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Rejected("image_missing", str(error)) from None


def too_large(size: int, limit: int) -> None:
    """Raises: Rejected where an image file of `size` bytes is over the limit."""
    if size > limit:
        raise Rejected("image_bytes", f"{size} bytes, wanted at most {limit}")


def text_or_none(value: Any) -> str | None:
    """A string as it is, anything else None."""
    return value if isinstance(value, str) else None
