"""Samples from Parquet files: an image column (bytes, or Hugging Face's struct of bytes and path) and captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.prepare.rejects import Broken, Rejected
from train.prepare.sources import UNIT_ROWS, Bad, Row, Unit, text_or_none, too_large
from train.shapes.corpus import BadArgument

SUFFIXES = (".parquet",)
BATCH = 16  # rows decoded at a time


def _pyarrow() -> Any:
    """The modules. Raises: BadArgument naming the extra where pyarrow is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadArgument("input: reading .parquet needs pyarrow: pip install 'semantic-routing[prepare]'") from None
    return pyarrow


@dataclass(frozen=True)
class Parquet:
    """Parquet files.

    Args:
        files: the files.
        image: column of the image file's bytes.
        key: column that identifies a sample; None: the file's name and the row's number.
        fields: caption columns.
        max_bytes: size an image may have.
    """

    files: tuple[str, ...]
    image: str
    key: str | None
    fields: tuple[str, ...]
    max_bytes: int

    def _open(self, path: str) -> Any:
        # Buffered: pages are read one by one, not a row group's whole column.
        arrow = _pyarrow()
        try:
            file = arrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
            coded = [field.name for field in file.schema_arrow if arrow.types.is_dictionary(field.type)]
            if not coded:
                return file
            # Else pyarrow checks all texts of a pandas categorical at once, and one that is not UTF-8 ends the file.
            return arrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, read_dictionary=coded)
        except (arrow.ArrowException, OSError) as error:
            raise Broken(f"{type(error).__name__}: {error}") from None

    def units(self, tick: Callable[[int], None]) -> Iterator[Unit]:
        """Row groups of about UNIT_ROWS rows together; start and stop count row groups.

        Raises: BadArgument where a column is missing, naming those there are.
        """
        for path in self.files:
            tick(Path(path).stat().st_size)
            try:
                file = self._open(path)
            except Broken:
                yield Unit(path, 0, None)  # met again by its rows, and listed then
                continue
            with file:
                for column in (self.image, *([self.key] if self.key else []), *self.fields):
                    if column not in file.schema_arrow.names:
                        there = ", ".join(file.schema_arrow.names)
                        raise BadArgument(f"input: wanted a column {column!r} in {path}, it has {there}")
                start, count = 0, 0
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if count and count + rows > UNIT_ROWS:
                        yield Unit(path, start, group)
                        start, count = group, 0
                    count += rows
                if count:
                    yield Unit(path, start, file.num_row_groups)

    def rows(self, unit: Unit) -> Iterator[Row | Bad]:
        """A row each. Memory: a few rows, and one page of each column."""
        arrow = _pyarrow()
        columns = list(dict.fromkeys([self.image, *([self.key] if self.key else []), *self.fields]))
        with self._open(unit.path) as file:
            if "url" in file.schema_arrow.names and "url" not in columns:
                columns.append("url")
            stop = file.num_row_groups if unit.stop is None else unit.stop
            at = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
            try:
                for batch in file.iter_batches(BATCH, row_groups=range(unit.start, stop), columns=columns):
                    for i in range(batch.num_rows):
                        yield self._row({c: batch.column(c)[i] for c in columns}, Path(unit.path).name, at)
                        at += 1
            except (arrow.ArrowException, OSError) as error:
                raise Broken(f"{type(error).__name__}: {error}") from None

    def _row(self, cells: dict[str, Any], name: str, at: int) -> Row | Bad:
        where = f"{name}:{at}"
        captions = {field: plain(cells[field]) for field in self.fields}
        key = where if self.key is None else plain(cells[self.key])
        if not isinstance(key, str | int):
            return Bad(where, Rejected("row_field", f"wanted a text or number in {self.key!r}"))

        def load() -> bytes:
            cell = cells[self.image]
            try:
                if isinstance(cell, Mapping):  # Hugging Face's struct; its path may be anything
                    cell = cell["bytes"]
                value = cell.as_py()
            except Exception as error:
                raise Rejected("image_missing", f"{self.image!r}: {type(error).__name__}: {error}") from None
            if value is None:
                raise Rejected("image_missing", f"no bytes in {self.image!r}")
            if not isinstance(value, bytes):
                raise Rejected("image_missing", f"wanted bytes in {self.image!r}, got {type(value).__name__}")
            too_large(len(value), self.max_bytes)
            return value

        url = text_or_none(plain(cells["url"])) if "url" in cells else None
        return Row(str(key), load, captions, url, str(at))


def plain(cell: Any) -> Any:
    """A cell's Python value; the bytes themselves of text that is not UTF-8; else the error, which is no text."""
    try:
        return cell.as_py()
    except Exception as error:
        text = getattr(cell, "value", cell)  # a dictionary's
        return text.as_buffer().to_pybytes() if hasattr(text, "as_buffer") else error
