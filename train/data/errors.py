"""What is raised when data cannot be read; the messages are one line and name the file."""

from __future__ import annotations

import re


class DataError(RuntimeError):
    """Data that cannot be used: a file is missing, damaged or out of reach. Nothing of it was trained on."""


def plain(error: BaseException) -> str:
    """An exception's message in one line, without the traceback that a loader process wraps it in."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return re.sub(r"^[\w.]*(Error|Exception): ", "", lines[-1]) if len(lines) > 1 else lines[0]


def lost_worker(error: RuntimeError) -> DataError | None:
    """The error of a loader process that was killed; None for any other error.

    DataLoader raises it from a signal handler: wherever the process is then, not only where it waits for data.
    """
    if isinstance(error, DataError) or "DataLoader worker" not in str(error):
        return None
    return DataError(f"data.workers: {plain(error)}; out of memory, or of shared memory?")
