"""The shared memory of streaming: freed when a run ends, and after it was killed by the next one, never another's.

streaming names its segments NNNNNN_* in the first free place, for every job on the machine alike, and can only clean up
all of them. Each process of a run holds a lock on a file of its own for each NNNNNN; the kernel drops it however the
process ends, so a file that can be locked alone belongs to nobody who lives.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from streaming import StreamingDataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedArray, SharedBarrier, SharedMemory, SharedScalar

SHARED = Path("/dev/shm")


def claims() -> Path:
    """The folder of this user's lock files: beside the segments, since other nodes or containers may share /tmp."""
    return (SHARED if SHARED.is_dir() else Path(tempfile.gettempdir())) / f"semantic-routing-{os.getuid()}"


def _identity(prefix: int) -> str:
    """What tells a segment from a later one of the same name; "" where there is none."""
    try:
        found = (SHARED / f"{prefix:06}_{LOCALS}").stat()
    except OSError:
        return ""
    return f"{found.st_ino} {found.st_ctime_ns}"


class Claim:
    """This process's share in the segments NNNNNN_*, until it ends or releases it."""

    def __init__(self, prefix: int, leads: bool) -> None:
        folder = claims()
        folder.mkdir(mode=0o700, exist_ok=True)
        self.path, self.leads = folder / f"{prefix:06}", leads
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self.handle, fcntl.LOCK_SH)
        os.pwrite(self.handle, f"{_identity(prefix):<64}".encode(), 0)  # the same from every rank of the node

    def release(self) -> None:
        """Give it up."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1
            if self.leads:
                self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def one_job_at_a_time(leads: bool, patience: float = 60.0) -> Iterator[None]:
    """Inside, no other job of this user takes a number on this machine: every rank looks for a free one by itself, and
    all must find the same.

    leads: of this node's ranks the one that holds the lock. patience: seconds after which it goes on without: two jobs
    on the same nodes may each wait for the other.
    """
    if not leads:
        yield
        return
    claims().mkdir(mode=0o700, exist_ok=True)
    handle = os.open(claims() / "starting", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end = time.monotonic() + patience
        while time.monotonic() < end:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def clean_stale() -> list[int]:
    """Remove the segments of this user's runs of which no process lives, and their lock files.

    Returns: their numbers.
    """
    cleaned = []
    for path in sorted(claims().glob("[0-9]" * 6)):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where one still holds its claim
                prefix, known = int(path.name), os.pread(handle, 64, 0).decode().strip()
                if known and known == _identity(prefix):
                    for name in sorted(SHM_TO_CLEAN, key=LOCALS.__eq__):  # last what tells whose the others are
                        (SHARED / f"{prefix:06}_{name}").unlink(missing_ok=True)
                    for name in (BARRIER_FILELOCK, CACHE_FILELOCK):
                        (Path(tempfile.gettempdir()) / f"{prefix:06}_{name}").unlink(missing_ok=True)
                    cleaned.append(prefix)
                path.unlink()
            finally:
                os.close(handle)
    return cleaned


def release(dataset: StreamingDataset) -> None:
    """Free the dataset's shared memory now; streaming itself keeps it, and its files, until the process ends."""
    if dataset._unique_rank_world.is_local_leader:  # streaming leaves them for good, and never takes their number again
        for name in (BARRIER_FILELOCK, CACHE_FILELOCK):
            (Path(tempfile.gettempdir()) / f"{dataset._shm_prefix_int:06}_{name}").unlink(missing_ok=True)
    pending = list(vars(dataset).values())
    while pending:
        value = pending.pop()
        if isinstance(value, SharedMemory):
            atexit.unregister(value.cleanup)
            value.cleanup()
        elif isinstance(value, SharedArray | SharedBarrier | SharedScalar):
            pending += vars(value).values()
        elif isinstance(value, Claim):
            value.release()
