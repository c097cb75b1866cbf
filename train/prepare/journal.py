"""What a run has done so far, on disk: SQLite in OUT/.prepare. A unit is done when its transaction is committed."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from train.prepare.sources import Unit

HASH_BYTES = 16


class Journal:
    """The plan, the units and their results; and of the first pass the pictures' hashes and the smallest row hashes."""

    def __init__(self, folder: Path) -> None:
        self.db = sqlite3.connect(folder / "journal.sqlite", isolation_level=None)
        self.db.executescript(
            """
            PRAGMA synchronous = FULL;
            CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
            CREATE TABLE IF NOT EXISTS units (id INTEGER PRIMARY KEY, unit TEXT, rows INTEGER, result TEXT);
            CREATE TABLE IF NOT EXISTS drawn (hash INTEGER PRIMARY KEY, rows INTEGER) WITHOUT ROWID;
            """
        )
        self.hashes = folder / "hashes.sqlite"
        self.db.execute("ATTACH ? AS h", (str(self.hashes),))
        self.db.execute(
            "CREATE TABLE IF NOT EXISTS h.first (hash BLOB PRIMARY KEY, unit INTEGER, row INTEGER) WITHOUT ROWID"
        )

    def close(self) -> None:
        """Close the files."""
        self.db.close()

    def get(self, name: str) -> Any:
        """A stored fact, None where there is none."""
        row = self.db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set(self, name: str, value: Any) -> None:
        """Store a fact."""
        self.db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def plan(self, units: Iterable[Unit]) -> None:
        """Store the units, all or none."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            self.db.execute("DELETE FROM units")
            self.db.executemany(
                "INSERT INTO units (id, unit) VALUES (?, ?)", ((i, json.dumps(u)) for i, u in enumerate(units))
            )
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def open_units(self, column: str) -> Iterator[tuple[int, Unit]]:
        """(number, unit) where `column`, rows (first pass) or result (second), is not there yet."""
        last = -1
        while True:  # no cursor is left open while the table changes
            query = f"SELECT id, unit FROM units WHERE {column} IS NULL AND id > ? ORDER BY id LIMIT 1"
            row = self.db.execute(query, (last,)).fetchone()
            if row is None:
                return
            last = row[0]
            yield last, Unit(*json.loads(row[1]))

    def count(self, column: str) -> tuple[int, int]:
        """(units where `column` is there, all units)."""
        return self.db.execute(f"SELECT COUNT({column}), COUNT(*) FROM units").fetchone()

    def rows(self, done: bool = False) -> int:
        """Rows that the first pass counted; done: those of units with a result."""
        query = "SELECT COALESCE(SUM(rows), 0) FROM units" + (" WHERE result IS NOT NULL" if done else "")
        return self.db.execute(query).fetchone()[0]

    def scanned(self, number: int, rows: int, drawn: list[int], hashes: list[tuple[int, bytes]], most: int) -> None:
        """Commit a unit of the first pass: of a picture's hash the earliest (unit, row) stays, of the row hashes
        those that the `most` smallest are among, each with its number of rows.

        A kill between two files' commits is harmless: to add the same pictures again changes nothing.
        """
        self.db.execute("BEGIN IMMEDIATE")
        self.db.executemany(
            "INSERT INTO h.first VALUES (?, ?, ?) ON CONFLICT (hash) DO UPDATE SET unit = excluded.unit,"
            " row = excluded.row WHERE (excluded.unit, excluded.row) < (first.unit, first.row)",
            ((digest, number, row) for row, digest in sorted(hashes, key=lambda pair: pair[1])),
        )
        self.db.executemany(
            "INSERT INTO drawn VALUES (?, ?) ON CONFLICT (hash) DO UPDATE SET rows = rows + excluded.rows",
            Counter(drawn).items(),
        )
        self.db.execute(
            "DELETE FROM drawn WHERE hash > (SELECT hash FROM drawn ORDER BY hash LIMIT 1 OFFSET ?)", (most,)
        )
        self.db.execute("UPDATE units SET rows = ? WHERE id = ?", (rows, number))
        self.db.execute("COMMIT")

    def val_below(self, most: int) -> int:
        """The largest row hash that no more than `most` rows are at or below; -1 where there is none."""
        below = -1
        for hash, rows in self.db.execute("SELECT hash, rows FROM drawn ORDER BY hash"):
            most -= rows
            if most < 0:
                break
            below = hash
        return below

    def converted(self, number: int, result: dict[str, Any]) -> None:
        """Commit a unit of the second pass: from now on its shards count."""
        self.db.execute("UPDATE units SET result = ? WHERE id = ?", (json.dumps(result), number))

    def results(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, result) of the units that are done, in order."""
        query = "SELECT id, result FROM units WHERE result IS NOT NULL ORDER BY id"
        for number, result in self.db.execute(query):
            yield number, json.loads(result)


class FirstCopies:
    """A worker's view of which row has the first copy of a picture."""

    def __init__(self, hashes: Path) -> None:
        self.db = sqlite3.connect(hashes.resolve().as_uri() + "?mode=ro&immutable=1", uri=True)

    def of(self, digest: bytes) -> tuple[int, int] | None:
        """(unit, row); None where the first pass did not see this picture."""
        return self.db.execute("SELECT unit, row FROM first WHERE hash = ?", (digest,)).fetchone()
