"""Ranks that die or are told to stop: the others end soon, nothing stays behind, the next run continues to the bit."""

import json
import os
import signal
import sys

import pytest

from tests.faults.conftest import STOP, losses
from train import checkpoint

ENDLESS = "--steps=100000"
FLAGS = ("--optim.schedule=constant", "--optim.lr=0.01", "--strategy=s3")  # the same whatever --steps


def continues(launch, folder, *flags):
    """The next run starts on the same machine, two steps further, and ends with the losses of one never stopped."""
    last = max(losses(folder)) + 2
    again = launch(folder.name, *FLAGS, *flags, f"--steps={last}", ranks=2).finish()
    assert "resume " in again.output
    assert again.orphans() == []
    whole = launch("whole", *FLAGS, *flags, f"--steps={last}", ranks=2).finish()
    assert losses(folder) == losses(whole.folder)


def test_a_killed_rank_ends_the_run_and_the_next_one_continues(launch):
    """kill -9 of one of two ranks mid-step, with loader processes."""
    flags = ("--zero=1", "--checkpoint_every=2", "--data.workers=2")
    run = launch("run", *FLAGS, *flags, ENDLESS, ranks=2)
    run.at_step(3)
    run.rank(1).kill()
    assert run.wait(STOP) != 0
    assert run.orphans() == []
    continues(launch, run.folder, *flags)


def test_a_launched_run_told_to_stop_ends_with_a_checkpoint(launch):
    """SIGTERM to the launcher's process group, as schedulers send it; the `deepspeed` command itself dies of it."""
    flags = ("--zero=2", "--checkpoint_every=100000")
    run = launch("run", *FLAGS, *flags, ENDLESS, ranks=2)
    run.at_step(2)
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.wait(STOP) == -signal.SIGTERM
    assert run.orphans() == []
    (path,) = (run.folder / "checkpoints").glob("step-*")
    assert checkpoint.fault(path) is None
    assert json.loads((path / "state.json").read_text())["step"] == max(losses(run.folder))
    continues(launch, run.folder, *flags)


def test_a_run_whose_output_nobody_reads_goes_on(start, tiny_flags, tmp_path):
    """Its reader ends after three lines, as a lost ssh connection does; SIGTERM still leads to a checkpoint."""
    flags = [*tiny_flags, *FLAGS, "--checkpoint_every=100000", f"--out={tmp_path / 'run'}", ENDLESS]
    pipe = ["sh", "-c", '"$@" 2>&1 | sed 3q', "sh"]
    run = start([*pipe, sys.executable, "-u", "train/run.py", *flags], tmp_path / "run")
    run.at_step(4)
    (trains,) = (p for p in run.processes() if p.cmdline()[1:3] == ["-u", "train/run.py"])
    trains.terminate()
    assert run.wait(STOP) == 0  # that of its reader
    assert len(run.output.splitlines()) == 3
    assert run.orphans() == []
    (path,) = (run.folder / "checkpoints").glob("step-*")
    assert checkpoint.fault(path) is None
    assert json.loads((path / "state.json").read_text())["step"] == max(losses(run.folder))


def test_an_interrupted_run_ends_at_once_in_one_line(launch):
    """Ctrl-C reaches the whole process group, the loader processes too."""
    run = launch("run", ENDLESS, "--data.workers=2")
    run.at_step(2)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait(STOP) == 130
    assert "interrupted" in run.output.splitlines()[-1]
    assert "Traceback" not in run.output, run.output
    assert run.orphans() == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_without_a_launcher(launch_ranks, victim):
    """Across nodes no launcher sees the death: the collective itself must fail, not wait."""
    runs = launch_ranks("run", ENDLESS, "--zero=2")
    runs[0].at_step(2)
    runs[victim].rank(victim).kill()
    assert runs[1 - victim].wait(STOP) not in (0, None)
    assert runs[0].orphans() == [] == runs[1].orphans()
