"""From a source to a prepared folder: OUT/train and OUT/val (MDS), quarantine.jsonl, report.json.

Two passes over units of the source, each unit committed as a whole, the state in OUT/.prepare. A kill at any moment
loses the units under way and no more: the same command does these again and goes on. What comes out depends on the
source and the arguments alone, not on the number of workers, their order, or where it was stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train.disk import alone, replace_text, sync
from train.prepare.journal import FirstCopies, Journal
from train.prepare.pool import Pool
from train.prepare.rejects import Broken, PrepareFailed
from train.prepare.shards import finish_folder, remove_others, stored, write_buckets
from train.prepare.sources import Bad, Unit
from train.prepare.units import VAL_BITS, Job, convert, file_names, scan
from train.shapes.corpus import BadArgument

STATE = ".prepare"
PEEK = 100  # rows of the first unit, of which one must be usable
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}


class _Stopped(KeyboardInterrupt):
    """A signal to stop."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def make_scan(job: Job) -> Callable[..., Any]:
    """A worker's part of the first pass."""
    names = file_names(job.source.files)
    return lambda number, unit, tick: scan(job, names[unit.path], unit, tick)


def make_convert(job: Job, state: Path, val_below: int) -> Callable[..., Any]:
    """A worker's part of the second pass."""
    first = FirstCopies(state / "hashes.sqlite") if job.duplicates == "drop" else None
    names = file_names(job.source.files)

    def work(number: int, unit: Unit, tick: Callable[[int], None]) -> dict[str, Any]:
        folder = state / "work" / f"{number:06}"
        folder.mkdir()
        return convert(job, names[unit.path], number, unit, folder, first, val_below, tick)

    return work


def _sources(job: Job) -> list[list[Any]]:
    """[path, bytes, modification time in ns] of every input file."""
    stats = ((path, os.stat(path)) for path in job.source.files)
    return [[path, s.st_size, s.st_mtime_ns] for path, s in stats]


def _same(out: Path, arguments: dict[str, Any], before: dict[str, Any], sources: Any, sources_before: Any) -> None:
    """Raises: BadArgument naming the first argument that differs from those `out` was begun with."""
    for name in [*before, *arguments]:
        if before.get(name) != arguments.get(name):
            raise BadArgument(
                f"{name.replace('_', '-')}: {out} was begun with {before.get(name)}, not {arguments.get(name)};"
                " want the same arguments, or another folder"
            )
    for old, new in zip(sources_before, sources, strict=False):
        if old != new:
            raise BadArgument(f"input: {out} was begun with {old[0]} of {old[1]} bytes, found {new[0]} changed or new")
    if len(sources_before) != len(sources):
        raise BadArgument(f"input: {out} was begun with {len(sources_before)} files, not {len(sources)}")


def _finished(out: Path, arguments: dict[str, Any], sources: list[list[Any]]) -> dict[str, Any] | None:
    """The report of a finished run of the same arguments; None where `out` is free, or a run can go on there.

    Raises: BadArgument where it holds something else.
    """
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise BadArgument(f"out: {path} is a file, want a folder")
    if not out.exists() or not any(out.iterdir()) or (out / STATE / "journal.sqlite").exists():
        return None
    if set(os.listdir(out)) == {STATE}:  # stopped before it had begun
        return None
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        before, sources_before = report["arguments"], report["sources"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadArgument(f"out: {out} holds files but no run of prepare, want a new or empty folder") from None
    _same(out, arguments, before, sources, sources_before)
    return report


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM raise _Stopped inside."""

    def stop(number: int, frame: Any) -> None:
        raise _Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _peek(job: Job, unit: Unit) -> None:
    """Raises: BadArgument where none of the first rows has the fields that are asked for."""
    why, count = "", 0
    try:
        for row in job.source.rows(unit):
            missing = isinstance(row, Bad) and row.why.reason in ("row_field", "row_not_json")
            gone = [] if isinstance(row, Bad) else [f for _, f in job.columns if row.captions.get(f) is None]
            if not missing and not gone:
                return
            why = why or (str(row.why) if isinstance(row, Bad) else f"no caption in {', '.join(map(repr, gone))}")
            count += 1
            if count == PEEK:
                break
    except Broken:
        return
    if count:
        raise BadArgument(f"input: none of the first {count} rows of {unit.path} can be used: {why}")


class _Run:
    """One process's part of preparing a folder."""

    def __init__(self, job: Job, out: Path, workers: int, progress: bool) -> None:
        self.job, self.out, self.state, self.workers = job, out, out / STATE, workers
        self.disable = None if progress else True  # None: no bar where stderr is not a terminal

    def plan(self, journal: Journal) -> None:
        """Cut the source into units, and look whether its first rows can be used. Raises: BadArgument."""
        total = sum(os.path.getsize(path) for path in self.job.source.files)
        with tqdm(total=total, desc="plan", unit="B", unit_scale=True, disable=self.disable) as bar:
            journal.plan(self.job.source.units(bar.update))
        for _, unit in journal.open_units("result"):
            _peek(self.job, unit)
            break

    def scan(self, journal: Journal) -> None:
        """First pass."""
        if journal.count("rows")[0] == journal.count("rows")[1]:
            return
        with (
            Pool(self._workers(journal, "rows"), make_scan, (self.job,)) as pool,
            tqdm(initial=journal.rows(), desc="first pass", unit=" rows", unit_scale=True, disable=self.disable) as bar,
        ):
            for number, _, (rows, drawn, hashes) in pool.run(journal.open_units("rows"), bar.update):
                journal.scanned(number, rows, drawn, hashes, self.job.val_rows)
                self._tell(bar, journal, "rows")

    def convert(self, journal: Journal, val_below: int) -> None:
        """Second pass."""
        if journal.count("result")[0] == journal.count("result")[1]:
            return
        spent, start = journal.get("seconds") or 0.0, time.monotonic()
        with (
            Pool(self._workers(journal, "result"), make_convert, (self.job, self.state, val_below)) as pool,
            tqdm(
                total=journal.rows(), initial=journal.rows(done=True), desc="convert", unit=" samples", unit_scale=True,
                disable=self.disable,
            ) as bar,
        ):  # fmt: skip
            for number, _, result in pool.run(journal.open_units("result"), bar.update):
                self._commit(journal, number, result)
                journal.set("seconds", spent + time.monotonic() - start)
                self._tell(bar, journal, "result")

    def _workers(self, journal: Journal, column: str) -> int:
        done, units = journal.count(column)
        return max(1, min(self.workers, units - done))

    def _tell(self, bar: Any, journal: Journal, column: str) -> None:
        done, units = journal.count(column)
        bar.set_postfix_str(f"{done}/{units} units", refresh=False)

    def _commit(self, journal: Journal, number: int, result: dict[str, Any]) -> None:
        """Shards to their folders, then the journal. Before that line they are nobody's, and deleted at a restart."""
        work = self.state / "work" / f"{number:06}"
        for folder, names in result.pop("files").items():
            target = self.out / folder
            target.mkdir(parents=True, exist_ok=True)
            for name, shard in zip(names, result["shards"][folder], strict=True):
                os.replace(work / folder / name, target / stored(shard)["basename"])
            sync(target)
        (self.state / "quarantine").mkdir(exist_ok=True)
        os.replace(work / "quarantine.jsonl", self.state / "quarantine" / f"{number:06}.jsonl")
        sync(self.state / "quarantine")
        journal.converted(number, result)
        shutil.rmtree(work)

    def clean(self, journal: Journal) -> None:
        """Delete what a killed run left half done."""
        shutil.rmtree(self.state / "work", ignore_errors=True)
        (self.state / "work").mkdir()
        shards = self._shards(journal)
        for folder in self._folders():
            name = str(folder.relative_to(self.out))
            remove_others(folder, journal.get(f"index {name}") or shards[name])

    def _folders(self) -> list[Path]:
        """The folders of shards that are there."""
        found = [self.out / split for split in ("train", "val") if (self.out / split).is_dir()]
        return found + [path for split in found for path in sorted(split.iterdir()) if path.is_dir()]

    def _shards(self, journal: Journal) -> dict[str, list[dict[str, Any]]]:
        """Index entries of every folder, in the units' order."""
        shards: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for _, result in journal.results():
            for folder, entries in result["shards"].items():
                shards[folder] += entries
        return shards

    def finish(self, journal: Journal, arguments: dict[str, Any], sources: list[list[Any]]) -> dict[str, Any]:
        """Indexes, quarantine.jsonl, report.json; in an order that a kill may break anywhere."""
        shards = self._shards(journal)
        extra = [column for column, _ in self.job.columns[1:]]
        made = {}
        total = sum(map(len, shards.values()))
        with tqdm(total=total, desc="index", unit=" shards", disable=self.disable) as bar:
            for folder, entries in sorted(shards.items()):
                done = journal.get(f"index {folder}")
                if done is None:
                    work = self.state / "merge"
                    shutil.rmtree(work, ignore_errors=True)
                    done = finish_folder(self.out / folder, work, entries, extra, bar.update)
                    journal.set(f"index {folder}", done)
                remove_others(self.out / folder, done)  # what was merged, now that the journal does not need it
                made[folder] = len(done)
        write_buckets(self.out, shards)
        with open(self.out / "quarantine.jsonl", "w", encoding="utf-8") as whole:
            for number, _ in journal.results():
                with open(self.state / "quarantine" / f"{number:06}.jsonl", encoding="utf-8") as part:
                    shutil.copyfileobj(part, whole)
            whole.flush()
            os.fsync(whole.fileno())
        report = self._report(journal, made, arguments, sources)
        replace_text(self.out / "report.json", json.dumps(report, indent=1) + "\n")
        return report

    def _report(
        self, journal: Journal, shards: dict[str, int], arguments: dict[str, Any], sources: list[list[Any]]
    ) -> dict[str, Any]:
        kept: Counter[str] = Counter()
        skipped: Counter[str] = Counter()
        sums: Counter[str] = Counter()
        for _, result in journal.results():
            kept.update(result["kept"])
            skipped.update(result["skipped"])
            sums.update({n: result[n] for n in ("rows", "broken", "captions_cut", "bytes_in", "bytes_out")})
        seconds = journal.get("seconds") or 0.0
        return {
            "format": "prepare",
            "arguments": arguments,
            "sources": sources,
            "kept": dict(sorted(kept.items())),
            "skipped": dict(sorted(skipped.items())),
            "broken_sources": sums["broken"],
            "rows": sums["rows"],
            "captions_cut": sums["captions_cut"],
            "bytes_in": sums["bytes_in"],
            "bytes_out": sums["bytes_out"],
            "shards": shards,
            "seconds": round(seconds, 3),
            "samples_per_s": round(sums["rows"] / seconds, 1) if seconds else None,
        }


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    skipped = ", ".join(f"{reason} {count}" for reason, count in report["skipped"].items()) or "none"
    lines = [
        "kept     " + (", ".join(f"{folder} {count}" for folder, count in report["kept"].items()) or "nothing"),
        f"skipped  {skipped}",
        f"bytes    {report['bytes_in'] / 1e6:.1f} MB of images in, {report['bytes_out'] / 1e6:.1f} MB of shards out",
        f"speed    {report['samples_per_s'] or 0:.0f} samples/s over {report['seconds']:.0f} s",
    ]
    if report["broken_sources"]:
        lines.append(f"broken   {report['broken_sources']} parts of sources, named in quarantine.jsonl")
    if report["captions_cut"]:
        lines.append(f"cut      {report['captions_cut']} captions, to the longest that is allowed")
    for split in ("train", "val"):
        if not any(folder.split("/")[0] == split for folder in report["kept"]):
            lines.append(f"warning  no sample for {split}/")
    return "\n".join(lines)


def _not_empty(out: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report. Raises: PrepareFailed where nothing was kept."""
    if not report["kept"]:
        raise PrepareFailed(f"kept: wanted a sample, got none; {out}/report.json and quarantine.jsonl say why")
    return report


def prepare(
    job: Job, out: Path, arguments: dict[str, Any], val: float, workers: int, progress: bool = True
) -> dict[str, Any]:
    """Prepare `out`, go on with it, or find it finished. Returns its report, which is also in OUT/report.json.

    arguments: what a restart must have in common, by flag; val: below 1 a share, else a number of samples, but at most
    a tenth of the rows. Raises: BadArgument; PrepareFailed where no sample is kept; PrepareFailed, OSError where the
    run cannot go on; SystemExit with 130 or 75 after SIGINT or SIGTERM.
    """
    sources = _sources(job)
    report = _finished(out, arguments, sources)
    if report is not None:
        shutil.rmtree(out / STATE, ignore_errors=True)
        print(f"prepare: {out} is finished: {sum(report['kept'].values())} samples", file=sys.stderr)
        return _not_empty(out, report)
    state = out / STATE
    state.mkdir(parents=True, exist_ok=True)
    run = _Run(job, out, workers, progress)
    with alone(state / "lock", BadArgument(f"out: another process prepares {state.parent}")):
        try:
            journal = Journal(state)
            try:
                report = _go_on(run, journal, arguments, sources, val)
            finally:
                journal.close()
        except sqlite3.Error as error:
            raise PrepareFailed(f"{state}: {error}; the same command continues") from None
        (state / "journal.sqlite").unlink()  # first: without it there is nothing to go on with
        shutil.rmtree(state, ignore_errors=True)
    print(f"prepare: wrote {out}\n{summary(report)}", file=sys.stderr)
    return _not_empty(out, report)


def _go_on(
    run: _Run, journal: Journal, arguments: dict[str, Any], sources: list[list[Any]], val: float
) -> dict[str, Any]:
    """All that is not done yet. Returns the report."""
    try:
        with _stoppable():
            if journal.get("arguments") is None:
                try:
                    run.plan(journal)
                except BadArgument:  # so that the right arguments may follow
                    (run.state / "journal.sqlite").unlink()
                    raise
                journal.set("sources", sources)
                journal.set("arguments", arguments)
            _same(run.out, arguments, journal.get("arguments"), sources, journal.get("sources"))
            run.clean(journal)
            run.scan(journal)
            if val < 1:
                below = int(val * 2**VAL_BITS) - 1
            else:
                below = journal.val_below(min(int(val), journal.rows() // 10))
            run.convert(journal, below)
            return run.finish(journal, arguments, sources)
    except KeyboardInterrupt as stop:
        done, units = journal.count("result")
        print(f"prepare: stopped; {done} of {units} units are done, the same command continues", file=sys.stderr)
        raise SystemExit(EXIT_CODES.get(getattr(stop, "number", signal.SIGINT), 130)) from None
