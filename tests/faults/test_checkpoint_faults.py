"""Saving that is killed anywhere, files that are broken anywhere, a disk that is full: no harm to what was whole."""

import json
import math
import shutil
import signal
import sys

import pytest
import torch

from tests.faults.conftest import free_port, losses
from train import checkpoint
from train.distributed import Ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
COMMON = ("--strategy=s3", "--optim.lr=0.01", "--steps=7", "--stop_at=6", "--checkpoint_every=2")
OPERATIONS = 40  # more than a save makes on files


@pytest.fixture(scope="module")
def whole(forks, tmp_path_factory):
    """A function ranks -> folder of a run of 6 steps that nothing happened to, all its checkpoints kept."""
    made = {}

    def run(ranks):
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp("whole") / f"run-{ranks}"
            codes, output = forks(made[ranks], *COMMON, "--keep_checkpoints=9", ranks=ranks)
            assert codes == [0] * ranks, output
        return made[ranks]

    return run


@pytest.fixture
def stopped(whole, tmp_path):
    """A function (ranks, name) -> folder of the same run as it was after its checkpoint of step 2."""

    def copy(ranks, name="run"):
        folder = shutil.copytree(whole(ranks), tmp_path / name, ignore=shutil.ignore_patterns("step-*", "summary*"))
        shutil.copytree(whole(ranks) / "checkpoints" / "step-0000002", folder / "checkpoints" / "step-0000002")
        (folder / "checkpoints" / "latest").write_text("step-0000002\n")
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 2))
        assert set(losses(folder)) == {1, 2}
        return folder

    return copy


def same_state(one, other):
    """Whether two checkpoints hold the same tensors, to the bit."""
    return all(
        (a := checkpoint.read_tensors(one, kind)).keys() == (b := checkpoint.read_tensors(other, kind)).keys()
        and all(torch.equal(a[name], b[name]) for name in a)
        for kind in checkpoint.KINDS
    )


def check_and_continue(folder, whole, forks, ranks):
    """What is found is one of the unbroken run's checkpoints, and continues as that run did. Returns its name."""
    found = checkpoint.find(folder / "checkpoints", ALONE)
    assert found.name in ("step-0000002", "step-0000004")
    assert same_state(found, whole / "checkpoints" / found.name)
    codes, output = forks(folder, *COMMON, "--keep_checkpoints=1", ranks=ranks)
    assert codes == [0] * ranks, output
    assert f"resume     {found}" in output
    assert losses(folder) == losses(whole)
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == ["latest", "step-0000006"]  # nothing half is left
    assert same_state(folder / "checkpoints" / kept[-1], whole / "checkpoints" / kept[-1])
    return found.name


@pytest.mark.parametrize(
    ("ranks", "victim", "background"),
    [(1, 0, False), (2, 0, False), (2, 1, False), (1, 0, True), (2, 0, True), (2, 1, True)],
)
def test_killed_before_any_operation_on_files_of_a_save(forks, whole, stopped, ranks, victim, background):
    """kill -9 before a change to files in one save, up to the last deletion of old ones: before each of them with one
    rank, every fourth with two, every sixth in the background."""
    flags = (*COMMON, "--keep_checkpoints=1", f"--async_save={str(background).lower()}")
    found = []
    for number in range(1, OPERATIONS, 6 if background else 4 if ranks == 2 else 1):
        folder = stopped(ranks, f"run-{number}")
        fault = {victim: [("kill_at_file_operation", {"step": 4, "number": number})]}
        codes, output = forks(folder, *flags, ranks=ranks, faults=fault)
        if codes == [0] * ranks:
            break  # a save makes fewer operations
        assert codes[victim] == -signal.SIGKILL, output
        assert all(code not in (0, None) for code in codes), output
        found.append(check_and_continue(folder, whole(ranks), forks, ranks))
    assert codes == [0] * ranks
    assert "step-0000002" in found
    assert sorted(found) == found
    assert victim or "step-0000004" in found


@pytest.mark.parametrize(("ranks", "victim", "size"), [(1, 0, 300_000), (2, 1, 1)])
def test_killed_in_the_middle_of_a_file(forks, whole, stopped, ranks, victim, size):
    folder = stopped(ranks)
    codes, output = forks(folder, *COMMON, ranks=ranks, faults={victim: [("die_in_write", {"step": 4, "size": size})]})
    assert codes[victim] == -signal.SIGXFSZ, output
    assert all(code not in (0, None) for code in codes), output
    half = [p.stat().st_size for p in (folder / "checkpoints" / "partial-step-0000004").iterdir()]
    assert min(half) <= size
    assert check_and_continue(folder, whole(ranks), forks, ranks) == "step-0000002"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


HARM = {
    "a bit of one rank's file": (lambda p: flip(p / "ema-000-00001-of-00002.safetensors", -5), "ema-000-00001-of"),
    "one rank's file": (lambda p: (p / "master-000-00001-of-00002.safetensors").unlink(), "master-000-00001-of"),
    "a bit of the manifest": (lambda p: flip(p / "manifest.json", 60), "step-0000006"),
    "latest is missing": (lambda p: (p.parent / "latest").unlink(), None),
    "latest is empty": (lambda p: (p.parent / "latest").write_text(""), None),
    "latest is dangling": (lambda p: (p.parent / "latest").write_text("step-0000099\n"), None),
}


@pytest.mark.parametrize("case", HARM)
def test_ranks_agree_on_the_newest_whole_one(forks, whole, tmp_path, case):
    harm, named = HARM[case]
    folder = shutil.copytree(whole(2), tmp_path / "run")
    harm(folder / "checkpoints" / "step-0000006")
    (folder / "metrics.jsonl").unlink()
    codes, output = forks(folder, *COMMON, "--keep_checkpoints=9", ranks=2)
    assert codes == [0, 0], output
    found = 4 if named else 6
    assert f"resume     {folder}/checkpoints/step-000000{found}, step {found}" in output
    if named:
        lines = [line for line in output.splitlines() if "is passed over: " in line]
        assert len(lines) == 1
        assert named in lines[0]
    assert losses(folder) == {step: loss for step, loss in losses(whole(2)).items() if step > found}
    assert same_state(*(f / "checkpoints" / "step-0000006" for f in (folder, whole(2))))


def test_no_rank_starts_anew_when_none_is_whole(forks, whole, tmp_path):
    folder = shutil.copytree(whole(2), tmp_path / "run")
    for path in (folder / "checkpoints").glob("step-*"):
        flip(path / "exp_avg-000-00001-of-00002.safetensors", 1000)
    codes, output = forks(folder, *COMMON, ranks=2)
    assert codes == [2, 2], output
    assert output.count("error: ") == 1
    assert "error: resume: none of the 3 checkpoints in" in output
    assert output.count("is passed over: ") == 3


@pytest.mark.parametrize(("ranks", "stop", "background"), [(1, 6, "false"), (2, 6, "false"), (2, 7, "true")])
def test_a_full_disk_fails_the_save_on_all_ranks_and_harms_nothing(
    start, tiny_flags, whole, small_disk, ranks, stop, background
):
    disk = small_disk(7)  # two checkpoints of 2.6 MB and half a third
    flags = [*tiny_flags, *COMMON, "--keep_checkpoints=9", f"--out={disk / 'run'}"]
    command = [sys.executable, "train/run.py", *flags, f"--async_save={background}"]
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}

    def run_all(stop):
        """Not through the launcher: it would end what hangs."""
        own = {**shared, "MASTER_PORT": str(free_port())}
        words = [*command, f"--stop_at={stop}"]
        runs = [start(words, disk / "run", {**own, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)]
        return [run.wait() for run in runs], "".join(run.output for run in runs)

    codes, output = run_all(stop)  # 7: the save of step 6 is not the last one, which is always waited for
    assert codes == [1] * ranks, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: checkpoint: writing")
    assert "No space left on device" in output
    assert "Traceback" not in output
    folder = disk / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-0000002", "step-0000004"]
    for name in ("step-0000002", "step-0000004"):
        assert checkpoint.fault(folder / name) is None
        assert same_state(folder / name, whole(ranks) / "checkpoints" / name)
    shutil.rmtree(folder / "step-0000002")  # room
    codes, output = run_all(6)
    assert codes == [0] * ranks, output
    assert losses(disk / "run") == losses(whole(ranks))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_in_the_middle_of_a_save(forks, whole, stopped, ranks):
    """To one rank alone: the save ends, one more step is done, all stop with its checkpoint."""
    folder = stopped(ranks)
    fault = ("signal_at_file_operation", {"step": 4, "number": 3, "which": int(signal.SIGTERM)})
    codes, output = forks(folder, *COMMON, ranks=ranks, faults={ranks - 1: [fault]})
    assert codes == [75] * ranks, output
    assert (folder / "checkpoints" / "latest").read_text() == "step-0000005\n"
    assert all(checkpoint.fault(path) is None for path in (folder / "checkpoints").glob("step-*"))
    codes, output = forks(folder, *COMMON, ranks=ranks)
    assert codes == [0] * ranks, output
    assert losses(folder) == losses(whole(ranks))


LONG = ("--strategy=s3", "--optim.lr=0.01", "--steps=30", "--checkpoint_every=100")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_steps_after_a_resume_are_the_unbroken_runs(forks, tmp_path, zero, ranks):
    """To the bit, over four ends of an epoch of 5 steps."""
    flags = (*LONG, f"--zero={zero}")
    for name, stops in (("whole", (24,)), ("broken", (3, 24))):
        for stop in stops:
            codes, output = forks(tmp_path / name, *flags, f"--stop_at={stop}", ranks=ranks)
            assert codes == [0] * ranks, output
    assert sorted(losses(tmp_path / "whole")) == list(range(1, 25))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


@pytest.mark.parametrize("zero", [1, 3])
def test_one_rank_two_ranks_one_rank_see_the_same_samples(forks, tmp_path, zero):
    """Noise and times belong to a sample's place in the order: equal losses are of equal samples in equal order."""
    flags = (*LONG, f"--zero={zero}")
    codes, output = forks(tmp_path / "whole", *flags, "--stop_at=14")
    assert codes == [0], output
    for ranks, stop in ((1, 3), (2, 9), (1, 14)):  # each within an epoch of 5 steps
        codes, output = forks(tmp_path / "changing", *flags, f"--stop_at={stop}", ranks=ranks)
        assert codes == [0] * ranks, output
    changing = losses(tmp_path / "changing")
    assert sorted(changing) == list(range(1, 15))
    for step, loss in losses(tmp_path / "whole").items():
        assert math.isclose(changing[step], loss, rel_tol=1e-5), step
