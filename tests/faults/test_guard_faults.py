"""What is not finite on one rank of two, a rank that stalls: all ranks do the same, or all end."""

import json
import signal

import pytest
import torch

from tests.faults.conftest import losses, rows
from train import checkpoint
from train.guards import STALLED


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_not_finite_on_one_rank_changes_nothing_on_any(forks, tmp_path, zero, dtype):
    """A loss of NaN on rank 1 in step 2, a gradient of infinity on rank 0 in step 3."""
    faults = {
        1: [("poison_loss", {"steps": [2], "value": "nan"})],
        0: [("poison_gradient", {"steps": [3], "value": "inf"})],
    }
    flags = ("--strategy=s3", f"--zero={zero}", f"--dtype={dtype}", "--steps=9", "--stop_at=4", "--checkpoint_every=1")
    folder = tmp_path / "run"
    codes, output = forks(folder, *flags, "--keep_checkpoints=9", ranks=2, faults=faults)
    assert codes == [0, 0], output
    assert [row["step"] for row in rows(folder) if "skipped" in row] == [2, 3]
    assert sorted(losses(folder)) == [1, 4]
    paths = [folder / "checkpoints" / f"step-000000{step}" for step in (1, 2, 3, 4)]
    states = [{kind: checkpoint.read_tensors(path, kind) for kind in checkpoint.KINDS} for path in paths]
    facts = [json.loads((path / "state.json").read_text()) for path in paths]
    for kind, first in states[0].items():
        for later in states[1:3]:
            assert all(torch.equal(first[name], later[kind][name]) for name in first)
        assert all(torch.isfinite(value).all() for value in states[3][kind].values())
    assert any(not torch.equal(value, states[3]["master"][name]) for name, value in states[0]["master"].items())
    for name in ("adam_step", "ema_steps", "schedule_step"):
        assert [f[name] - facts[0][name] for f in facts] == [0, 0, 0, 1]


def test_all_ranks_give_up_together(forks, tmp_path):
    flags = ("--strategy=s3", "--zero=2", "--steps=9", "--checkpoint_every=2", "--guard.max_skipped=3")
    fault = ("poison_gradient", {"steps": [2, 4, 5, 6], "value": "nan"})
    codes, output = forks(tmp_path / "run", *flags, ranks=2, faults={1: [fault]})
    assert codes == [1, 1], output
    assert output.count("error: ") == 1
    assert "error: loss or gradient: not finite in 3 steps in a row (guard.max_skipped), the last is step 6" in output
    assert "Traceback" not in output
    assert sorted(losses(tmp_path / "run")) == [1, 3]
    assert checkpoint.fault(tmp_path / "run" / "checkpoints" / "step-0000004") is None


@pytest.mark.parametrize("still", [0, 1])
def test_a_rank_that_stands_still_is_named(launch_ranks, still):
    """SIGSTOP of one rank: the other ends with the documented code and says who is missing, and where."""
    runs = launch_ranks("run", "--steps=100000", "--zero=1", "--guard.stall_seconds=15")
    runs[0].at_step(2)
    runs[still].rank(still).send_signal(signal.SIGSTOP)
    other = runs[1 - still]
    assert other.wait() == STALLED
    assert f"error: rank {1 - still} has been in " in other.output
    assert f"rank {still} was last heard of" in other.output
    assert other.orphans() == []
