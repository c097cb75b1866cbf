"""Real training runs that tests may break: started in their own process group, watched, killed, searched for orphans.

Every test in this folder carries the marker `faults`. The fixtures of a tiny run (`llm_folder`, `corpus`, `tiny_flags`)
are those of tests/train.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from tests.train.conftest import corpus, llm_folder, tiny_flags

__all__ = ["corpus", "llm_folder", "tiny_flags"]

ROOT = Path(__file__).parent.parent.parent
MARK = "SEMANTIC_ROUTING_FAULT_RUN"  # an environment variable that every process of a run inherits
START, STOP = 240, 90  # seconds: until a run must have begun on a busy machine; until a failed one must have ended


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


def free_port():
    """A TCP port nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rows(folder):
    """The rows of a run's metrics.jsonl so far, a line that is still being written left out; [] before the first."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(folder):
    """Training loss by step, as the newest row of a step has it."""
    return {row["step"]: row["loss"] for row in rows(folder) if "loss" in row}


def wait_for(condition, seconds, what):
    """Poll until `condition()` is true, and return what it gave. Raises: AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return value


class Run:
    """One started command and all that descends from it, in a process group of its own.

    Attributes: `folder` (--out of the training run), `process` (Popen of the command), `log` (file of its stdout and
    stderr together).
    """

    def __init__(self, command, folder, log, environment=None):
        self.folder, self.log, self.mark = Path(folder), Path(log), uuid.uuid4().hex
        own = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
        }
        with open(self.log, "w") as out:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env={**os.environ, **own, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # a shell that runs the tests in the background has them, and all that they start, ignore Ctrl-C
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def output(self):
        """What all its processes printed so far."""
        return self.log.read_text(errors="replace")

    @property
    def errors(self):
        """Its lines "error: ..." so far."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    def processes(self):
        """Its living processes, zombies left out, wherever they were re-parented to: the mark tells."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def rank(self, number):
        """The psutil.Process of a rank that trains: the eldest one of this RANK that runs train/run.py."""
        found = []
        for process in self.processes():
            try:
                if process.environ().get("RANK") == str(number) and "train/run.py" in process.cmdline():
                    found.append(process)
            except psutil.Error:
                continue
        assert found, f"rank {number} does not run:\n{self.output[-3000:]}"
        return min(found, key=lambda p: p.create_time())

    def at_step(self, step, seconds=START):
        """Wait until the metrics hold this training step or a later one: the run then is in a next one.

        Raises: AssertionError with the output's end when the run ends before, or takes longer.
        """

        def there():
            if max(losses(self.folder), default=0) >= step:
                return True
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output[-3000:]}"
            return False

        wait_for(there, seconds, f"step {step}")

    def says(self, text, seconds=START):
        """Wait until the output holds this text. Raises: AssertionError as `at_step` does."""

        def there():
            if text in self.output:
                return True
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output[-3000:]}"
            return False

        wait_for(there, seconds, repr(text))

    def wait(self, seconds=START):
        """Exit code of the command. Raises: AssertionError with the output's end after so many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output[-3000:]}") from None

    def finish(self, seconds=START):
        """Wait for exit code 0. Raises: AssertionError with the output's end for any other."""
        assert self.wait(seconds) == 0, self.output[-6000:]
        return self

    def signal(self, number=signal.SIGTERM):
        """Send a signal to the started command, as a scheduler does."""
        self.process.send_signal(number)

    def orphans(self, seconds=STOP):
        """The processes that outlive the command by more than so many seconds; [] as soon as there are none."""
        end = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        return left

    def kill(self):
        """Kill what is left of it."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    """A function (command, folder, environment) -> Run of any command; what still runs at the test's end is killed."""
    runs = []

    def begin(command, folder=tmp_path, environment=None):
        runs.append(Run(command, folder, tmp_path / f"log-{len(runs)}.txt", environment))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


@pytest.fixture
def launch(start, tiny_flags, tmp_path):
    """A function (name, *flags, ranks=1, launcher=None, environment=None, python=()) -> Run of train/run.py.

    The tiny run's flags come first, so that `flags` override them; its --out is tmp_path / name, the same at every
    call, so that a second call resumes. launcher: through DeepSpeed's launcher with that many ranks; without it, as one
    plain process. Default: the launcher where there are several ranks. python: the interpreter's arguments before the
    script.
    """

    def begin(name, *flags, ranks=1, launcher=None, environment=None, python=()):
        if launcher if launcher is not None else ranks > 1:
            ports = ["--master_port", free_port()]
            front = [Path(sys.executable).parent / "deepspeed", "--num_gpus", ranks, *ports]
            assert not python, "the launcher chooses its ranks' interpreter"
        else:
            assert ranks == 1, "several ranks need the launcher, or `launch_ranks`"
            front = [sys.executable, "-u", *python]
        folder = tmp_path / name
        return start([*front, "train/run.py", *tiny_flags, f"--out={folder}", *flags], folder, environment)

    return begin


@pytest.fixture
def launch_ranks(start, tiny_flags, tmp_path):
    """A function (name, *flags, ranks=2, environments={}) -> one Run a rank, with no launcher that kills the others.

    Shows what the ranks themselves do when one fails. environments: {rank: variables of that rank alone}.
    """

    def begin(name, *flags, ranks=2, environments=None):
        folder, port = tmp_path / name, str(free_port())
        command = [sys.executable, "-u", "train/run.py", *tiny_flags, f"--out={folder}", *flags]
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            start(command, folder, {**shared, "RANK": str(r), "LOCAL_RANK": str(r), **(environments or {}).get(r, {})})
            for r in range(ranks)
        ]

    return begin


@pytest.fixture
def small_disk(tmp_path):
    """A function (mebibytes) -> folder that holds no more: a tmpfs of its own. Skips where mounting is not allowed."""
    mounted = []

    def make(mebibytes):
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting a small tmpfs needs root")
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a small tmpfs: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Forks:
    """Runs in forked processes of one interpreter that has imported everything. See forks.py for the faults."""

    def __init__(self, folder, flags):
        self.folder, self.flags, self.mark = folder, flags, uuid.uuid4().hex
        own = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            MARK: self.mark,
        }
        alone = []
        if os.geteuid() == 0 and shutil.which("unshare"):  # with shared memory of its own: other runs name theirs alike
            alone = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
        self.process = subprocess.Popen(
            [*alone, sys.executable, str(Path(__file__).with_name("forks.py"))],
            cwd=ROOT, env={**os.environ, **own}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.jobs = 0

    def __call__(self, folder, *flags, ranks=1, faults=None, seconds=START):
        """Run train/run.py in `folder` with the tiny run's flags; (exit codes of the ranks, what they printed).

        faults: {rank: [(function of forks.py, its arguments), ...]}. A code is negative for the signal that ended the
        rank, and None for one that had to be killed after so many seconds.
        Raises: AssertionError when a process outlives the ranks.
        """
        self.jobs += 1
        log = self.folder / f"forks-{self.jobs}.txt"
        argv = [*self.flags, f"--out={folder}", *flags]
        job = {"argv": argv, "world": ranks, "faults": faults or {}, "log": str(log), "seconds": seconds}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        codes, output = json.loads(self.process.stdout.readline()), log.read_text(errors="replace")
        wait_for(lambda: not self.left(), STOP, f"the end of {self.left()}:\n{output[-3000:]}")
        return codes, output

    def left(self):
        """The processes of a job that still run, zombies left out."""
        found = []
        for process in psutil.process_iter():
            try:
                alive = process.pid != self.process.pid and process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def close(self):
        """End it."""
        self.process.stdin.close()
        self.process.wait(STOP)


@pytest.fixture(scope="session")
def forks(tmp_path_factory, tiny_flags):
    """A function (folder, *flags, ranks=1, faults=None) -> (exit codes, output); see `Forks`."""
    begun = Forks(tmp_path_factory.mktemp("forks"), tiny_flags)
    yield begun
    begun.close()
