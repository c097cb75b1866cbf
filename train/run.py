"""Train: `deepspeed train/run.py --strategy s3`, or `python train/run.py` on one process. --help lists every flag."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn, TextIO

if not __package__:  # run as a script: the folder of this file comes first on the path, the packages stand one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.config import ConfigError
from train.flags import fail, parse

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what is wrong with a disk, not with the program


def main(argv: list[str] | None = None) -> int:
    """Parse, train, and turn a setting that cannot be used into one line and exit code 2."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        import torch

        from train.checkpoint import CheckpointError
        from train.data import DataError
        from train.distributed import sound_alarm
        from train.guards import NonFiniteSteps
        from train.loop import train
    except ConfigError as error:
        return fail(error)
    try:
        code = train(config)
        if __name__ == "__main__":
            torch.distributed.destroy_process_group()
        return code
    except ConfigError as error:
        return fail(error)
    except (NonFiniteSteps, CheckpointError) as error:
        fail(error)
        return 1
    except (DataError, OSError) as error:  # of this rank, perhaps of others
        if isinstance(error, OSError) and error.errno not in FULL:
            raise
        if sound_alarm():
            line = error if isinstance(error, DataError) else f"{error.filename or 'a file'}: {error.strerror}"
            print(f"error: {line}", file=sys.stderr, flush=True)
        let_the_others_hear()
        return 1


def let_the_others_hear() -> None:
    """They end in silence; a connection that closes before would be an error to them."""
    from train.guards import GRACE

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        time.sleep(GRACE)


class Output:
    """A standard stream. When it cannot be written any more (an ssh connection is gone, a log's disk is full) its lines
    are lost, and nothing else.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write what can be written; how many characters were given."""
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Send what was written, where somebody reads."""
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def leave(code: int) -> NoReturn:
    """End the process: exit hooks and output first, but without taking the interpreter down.

    PyTorch aborts when that stops a thread which frees a tensor, and one may still fetch a shard.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)  # type: ignore[assignment]
    try:
        code = main()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted; the same command continues from the newest checkpoint", file=sys.stderr)
        code = 130
    except Exception:
        traceback.print_exc()
        with contextlib.suppress(ImportError):  # perhaps that is what failed
            from train.distributed import sound_alarm

            sound_alarm()
            let_the_others_hear()
        code = 1
    leave(code)
