"""A step that is not finite changes nothing at any ZeRO stage; spikes, signals and stalls are seen."""

import json
import math
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from tests.train.test_run import losses
from train import checkpoint, guards, loop
from train.config import GuardConfig
from train.run import main


def poison(monkeypatch, steps, micro_steps=1):
    """Make the target NaN at these steps (from 1), in the last micro-step alone."""
    count, true = [0], loop.velocity

    def velocity(data, noise):
        count[0] += 1
        bad = math.ceil(count[0] / micro_steps) in steps and count[0] % micro_steps == 0
        return true(data, noise) * (float("nan") if bad else 1.0)

    monkeypatch.setattr(loop, "velocity", velocity)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_changes_nothing(train, monkeypatch, zero, dtype):
    flags = ("--strategy=s3", f"--zero={zero}", f"--dtype={dtype}", "--checkpoint_every=1", "--keep_checkpoints=9",
             "--micro_batch_size=4", "--optim.warmup_steps=0", "--optim.schedule=cosine")  # fmt: skip
    poison(monkeypatch, {2}, micro_steps=2)
    folder = train("run", *flags, "--steps=3")
    assert sorted(losses(folder)) == [1, 3]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "skipped" in row] == [2]
    kept = [
        {kind: checkpoint.read_tensors(folder / "checkpoints" / f"step-000000{i}", kind) for kind in checkpoint.KINDS}
        for i in (1, 2, 3)
    ]
    facts = [json.loads((folder / "checkpoints" / f"step-000000{i}" / "state.json").read_text()) for i in (1, 2, 3)]
    for kind in checkpoint.KINDS:
        assert all(torch.equal(kept[0][kind][name], kept[1][kind][name]) for name in kept[0][kind])
        assert all(torch.isfinite(value).all() for value in kept[2][kind].values())  # nothing leaked into the next
    assert any(not torch.equal(kept[1]["master"][name], kept[2]["master"][name]) for name in kept[1]["master"])
    for name in ("adam_step", "ema_steps", "schedule_step"):
        assert facts[0][name] == facts[1][name] == facts[2][name] - 1


def test_a_run_gives_up_after_so_many_in_a_row(tiny_flags, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {2, 4, 5, 6})
    assert main([*tiny_flags, f"--out={tmp_path / 'run'}", "--steps=9", "--guard.max_skipped=3"]) == 1
    printed = capsys.readouterr().err
    assert "loss or gradient: not finite in 3 steps in a row (guard.max_skipped), the last is step 6" in printed
    assert "the weights of step 3 are untouched" in printed


class OneParameter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.module = torch.nn.Linear(1, 1)


def test_a_gradient_that_is_not_finite_is_seen_where_the_loss_is(ranks_alone):
    engine = OneParameter()
    guard = guards.Guard(GuardConfig(), engine, ranks_alone)
    loss = engine.module(torch.ones(1, 1)).sum()
    loss.backward()
    assert guard.verdict(1)
    (engine.module(torch.ones(1, 1)) * 0).sqrt().sum().backward()  # 0, with a gradient of 0 times infinity
    assert not guard.verdict(2)
    assert guard.verdict(3)
    assert guard.skipped == 1


def test_a_spike_stands_out_of_the_noise(ranks_alone):
    guard = guards.Guard(GuardConfig(spike=8), OneParameter(), ranks_alone)
    for i in range(50):
        assert guard.spike(1.0 + 0.01 * math.sin(7 * i)) is None
    assert guard.spike(1.5) > 8
    assert guard.spike(1.005) is None


def test_a_signal_ends_the_run_with_a_checkpoint_and_the_next_one_continues(train, tiny_flags, tmp_path, monkeypatch):
    flags = ["--steps=4", "--optim.lr=0.01"]
    whole = losses(train("whole", *flags))
    step, calls = loop.training_step, []

    def stop_at_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "training_step", stop_at_second)
    assert main([*tiny_flags, f"--out={tmp_path / 'run'}", *flags]) == guards.PREEMPTED
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-0000002\n"
    assert losses(train("run", *flags)) == whole


def test_a_signal_waits_for_the_checkpoint_that_is_being_written(train, tiny_flags, tmp_path, monkeypatch):
    flags = ["--steps=5", "--optim.lr=0.01", "--checkpoint_every=2", "--async_save=true"]
    whole = losses(train("whole", *flags))
    step, write, sent, calls = loop.training_step, checkpoint._Folder.write, threading.Event(), []

    def stop_at_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            sent.set()
        return step(*arguments)

    def late(self, *arguments):
        assert self.step != 2 or sent.wait(60)
        return write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", stop_at_third)
        patch.setattr(checkpoint._Folder, "write", late)
        assert main([*tiny_flags, f"--out={tmp_path / 'run'}", *flags]) == guards.PREEMPTED
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-0000002", "step-0000003"]
    assert [checkpoint.fault(path) for path in checkpoint.candidates(folder)] == [None, None]
    assert losses(train("run", *flags)) == whole


def test_a_phase_that_never_ends_ends_the_process_with_its_stacks():
    code = (
        "import threading; from train.distributed import Ranks; from train.guards import Watchdog;"
        "w = Watchdog(0.2, Ranks(3, 1, 0, None)); w.at('data', 7); threading.Event().wait(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == guards.STALLED
    assert "error: rank 3 has been in 'data' of step 7 for more than 0.2 s" in done.stderr
    assert "threading.py" in done.stderr
