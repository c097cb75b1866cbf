"""Worker processes that take one unit at a time; a worker that dies is named with its unit, never waited for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from PIL import Image

from train.prepare.rejects import PrepareFailed
from train.prepare.sources import Unit
from train.shapes.corpus import BadArgument

TELL_EVERY = 0.25  # seconds between a worker's signs of progress
Work = Callable[[int, Unit, Callable[[int], None]], Any]


def serve(pipe: Connection, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    """A worker's life: (number, unit) in; ("tick", rows), ("done", result), ("failed", line) out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # of Pillow, about files that are refused or fine
    Image.MAX_IMAGE_PIXELS = None  # images.py has its own, lower bound
    rows, last = 0, time.monotonic()

    def tick(count: int) -> None:
        nonlocal rows, last
        rows += count
        if time.monotonic() - last > TELL_EVERY:
            pipe.send(("tick", rows))
            rows, last = 0, time.monotonic()

    try:
        work: Work | None = None
        while True:
            number, unit = pipe.recv()
            try:
                work = work or make(*arguments)  # not before there is a unit to fail with
                result = work(number, unit, tick)
            except MemoryError:
                raise  # the parent says what needs less
            except Exception as error:
                if not isinstance(error, (OSError, sqlite3.Error, BadArgument)):
                    traceback.print_exc()
                pipe.send(("failed", " ".join(f"{type(error).__name__}: {error}".split())))
                return
            pipe.send(("tick", rows))
            rows = 0
            pipe.send(("done", result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)  # the parent is gone; nobody will take what we have


class Pool:
    """`workers` processes; use as a context manager. `pids` are theirs."""

    def __init__(self, workers: int, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("forkserver")  # no locks or threads of ours are copied
        context.set_forkserver_preload(["train.prepare.units", "streaming"])
        self.processes: dict[Connection, Any] = {}
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, make, arguments), daemon=True)
            process.start()
            theirs.close()
            self.processes[ours] = process

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [process.pid for process in self.processes.values()]

    def run(self, units: Iterator[tuple[int, Unit]], tick: Callable[[int], None]) -> Iterator[tuple[int, Unit, Any]]:
        """(number, unit, result) as they come; `tick` is told of rows passed.

        Raises: PrepareFailed where a worker dies, or reports that it cannot go on.
        """
        busy: dict[Connection, tuple[int, Unit]] = {}
        idle = list(self.processes)
        while True:
            while idle and (task := next(units, None)) is not None:
                pipe = idle.pop()
                busy[pipe] = task
                try:
                    pipe.send(task)
                except OSError:
                    raise self._dead(pipe, task) from None
            if not busy:
                return
            for pipe in cast("list[Connection]", wait(list(busy))):
                number, unit = busy[pipe]
                try:
                    kind, value = pipe.recv()
                except (EOFError, OSError):
                    raise self._dead(pipe, busy[pipe]) from None
                if kind == "tick":
                    tick(value)
                elif kind == "failed":
                    raise PrepareFailed(f"unit {number} ({unit.path}): {value}; the same command continues")
                else:
                    del busy[pipe]
                    idle.append(pipe)
                    yield number, unit, value

    def _dead(self, pipe: Connection, task: tuple[int, Unit]) -> PrepareFailed:
        process = self.processes[pipe]
        process.join(5)
        code = process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
            if -code == signal.SIGKILL:
                how += ", perhaps by the kernel, out of memory"
        return PrepareFailed(
            f"the worker of unit {task[0]} ({task[1].path}) died ({how}); the same command continues, fewer --workers"
            " or a lower --max-pixels need less memory"
        )

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: Any) -> None:
        for pipe, process in self.processes.items():
            pipe.close()
            process.terminate()
        for process in self.processes.values():
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
