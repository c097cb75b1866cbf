"""What makes a checkpoint whole, which one is found, and that any stage continues from any other's."""

import json
import os
import shutil
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.test_run import losses
from train import checkpoint, loop, preflight
from train.config import ConfigError
from train.distributed import Ranks
from train.run import main

FILE = "exp_avg-000-00000-of-00001.safetensors"
ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(tiny_flags, tmp_path_factory):
    """A stopped run with two checkpoints; tests copy it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    flags = ["--steps=6", "--stop_at=4", "--checkpoint_every=2", "--zero=1", "--strategy=s3", "--optim.lr=0.01"]
    assert main([*tiny_flags, f"--out={folder}", *flags]) == 0
    return folder


@pytest.fixture
def folder(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run") / "checkpoints"


def test_the_newest_whole_checkpoint_is_found_whatever_latest_says(folder):
    assert checkpoint.find(folder / "absent", ALONE) is None
    assert checkpoint.find(folder, ALONE).name == "step-0000004"
    (folder / "latest").write_text("step-0000002\n")
    assert checkpoint.find(folder, ALONE).name == "step-0000002"
    for broken in ("", "\n", "step-0000099\n", "../step-0000002\n"):
        (folder / "latest").write_text(broken)
        assert checkpoint.find(folder, ALONE).name == "step-0000004"
    (folder / "latest").unlink()
    (folder / "partial-step-0000009").mkdir()
    assert checkpoint.find(folder, ALONE).name == "step-0000004"


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: flip(p / FILE), f"{FILE} is not what was written"),
        (lambda p: flip(p / "state.json", 40), "state.json is not what was written"),
        (lambda p: (p / "state.json").unlink(), "state.json is missing"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda p: (p / "state.json").write_text("{}"), "state.json has 2 bytes"),
    ],
)
def test_a_broken_checkpoint_is_named_and_passed_over(folder, harm, message, capsys):
    harm(folder / "step-0000004")
    assert checkpoint.find(folder, ALONE).name == "step-0000002"
    printed = capsys.readouterr().err
    assert "checkpoint step-0000004 is passed over: " in printed
    assert message in printed


def test_any_flipped_bit_and_any_cut_of_any_file_is_found(run, tmp_path_factory):
    path = shutil.copytree(run / "checkpoints" / "step-0000004", tmp_path_factory.mktemp("flipped") / "step-0000004")
    content = {file: file.read_bytes() for file in sorted(path.iterdir())}

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(list(content)), st.floats(0, 1, exclude_max=True), st.integers(0, 8))
    def harm(file, share, bit):
        data = bytearray(content[file])
        at = int(share * len(data))
        if bit == 8:
            del data[at:]
        else:
            data[at] ^= 1 << bit
        file.write_bytes(data)
        try:
            found = checkpoint.fault(path)
            assert found is not None
            assert str(path) in found
        finally:
            file.write_bytes(content[file])

    harm()
    assert checkpoint.fault(path) is None


def test_with_none_whole_the_run_does_not_start_anew(folder, tiny_flags, capsys):
    for step in folder.glob("step-*"):
        flip(step / "state.json", 40)
    assert main([*tiny_flags, f"--out={folder.parent}", "--steps=6", "--strategy=s3"]) == 2
    assert f"error: resume: none of the 2 checkpoints in {folder} is whole" in capsys.readouterr().err
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "latest").write_text("step-0000004\n")
    with pytest.raises(ConfigError, match="none of the 0 checkpoints"):
        checkpoint.find(folder, ALONE)


def test_only_the_newest_and_the_chosen_checkpoints_are_kept(train):
    flags = ("--steps=5", "--checkpoint_every=1", "--keep_checkpoints=2", "--keep_every=2")
    kept = train("run", *flags) / "checkpoints"
    assert sorted(p.name for p in kept.iterdir() if p.is_dir()) == ["step-0000002", "step-0000004", "step-0000005"]
    assert (kept / "latest").read_text() == "step-0000005\n"


def test_what_is_no_checkpoint_is_left_alone(train):
    folder = train("run", "--steps=6", "--stop_at=2", "--checkpoint_every=2") / "checkpoints"
    names = ["step-0000002-good", "step-2", "partial-mine"]
    for name in names:
        (folder / name).mkdir()
    train("run", "--steps=6", "--checkpoint_every=2", "--keep_checkpoints=1", "--keep_every=4")
    found = sorted(p.name for p in folder.iterdir() if p.is_dir())
    assert found == sorted([*names, "step-0000004", "step-0000006"])
    assert checkpoint.candidates(folder) == [folder / "step-0000006", folder / "step-0000004"]


def test_a_failed_write_leaves_the_one_before_and_no_partial_folder(folder, tiny_flags, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    flags = ["--steps=6", "--checkpoint_every=2", "--zero=1", "--strategy=s3", "--optim.lr=0.01"]
    assert main([*tiny_flags, f"--out={folder.parent}", *flags]) == 1
    assert "the one before is untouched; rank 0: OSError: [Errno 28] No space left" in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-0000002", "step-0000004"]
    assert checkpoint.find(folder, ALONE).name == "step-0000004"


@pytest.fixture
def held_up(monkeypatch):
    """A function (steps): what a background save writes waits until one of these steps (from 1) begins."""

    def hold(*steps):
        go, write, train = threading.Event(), checkpoint.save_file, loop.training_step

        def save_file(*arguments):
            if threading.current_thread() is not threading.main_thread():
                go.wait()
            write(*arguments)

        def training_step(parts, step, *arguments):
            if step + 1 in steps:
                go.set()
            else:
                go.clear()
            return train(parts, step, *arguments)

        monkeypatch.setattr(checkpoint, "save_file", save_file)
        monkeypatch.setattr(loop, "training_step", training_step)

    return hold


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_background_save_is_of_its_step_whatever_is_trained_meanwhile(train, held_up, zero, capsys):
    flags = ("--strategy=s3", "--optim.lr=0.01", "--steps=6", "--checkpoint_every=3", "--keep_checkpoints=9")
    waited = train("waited", *flags, f"--zero={zero}") / "checkpoints"
    held_up(5, 6)  # two steps after that of the first checkpoint
    capsys.readouterr()
    background = train("background", *flags, f"--zero={zero}", "--async_save=true") / "checkpoints"
    said = capsys.readouterr().err
    assert said.index("step 4/6") < said.index(f"step 3  checkpoint {background / 'step-0000003'}")
    assert said.index(f"step 3  checkpoint {background / 'step-0000003'}") < said.index("step 6  checkpoint")
    assert sorted(p.name for p in background.iterdir()) == ["latest", "step-0000003", "step-0000006"]
    for step in ("step-0000003", "step-0000006"):
        assert checkpoint.fault(background / step) is None
        for kind in checkpoint.KINDS:
            one, other = (checkpoint.read_tensors(folder / step, kind) for folder in (waited, background))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
        facts = [json.loads((folder / step / "state.json").read_text()) for folder in (waited, background)]
        assert [facts[1].pop("config")["async_save"], facts[0].pop("config")["async_save"]] == [True, False]
        assert facts[0] == facts[1]


def test_what_is_being_saved_is_kept_when_a_run_gives_up(tiny_flags, tmp_path, held_up, monkeypatch, capsys):
    held_up(6)  # the step that gives up: the save was busy as it began
    true, count = loop.velocity, [0]

    def velocity(data, noise):
        count[0] += 1
        return true(data, noise) * (float("nan") if count[0] > 3 else 1.0)

    monkeypatch.setattr(loop, "velocity", velocity)
    flags = ["--steps=9", "--checkpoint_every=3", "--guard.max_skipped=3", "--async_save=true", "--strategy=s3"]
    assert main([*tiny_flags, f"--out={tmp_path / 'run'}", *flags]) == 1
    assert "not finite in 3 steps in a row" in capsys.readouterr().err
    assert checkpoint.find(tmp_path / "run" / "checkpoints", ALONE).name == "step-0000003"


def test_a_background_save_that_fails_leaves_the_one_before(folder, tiny_flags, monkeypatch, capsys):
    write = checkpoint.save_file

    def full(*arguments):
        if threading.current_thread() is not threading.main_thread():
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", full)
    flags = ["--steps=9", "--checkpoint_every=6", "--zero=1", "--strategy=s3", "--optim.lr=0.01", "--async_save=true"]
    assert main([*tiny_flags, f"--out={folder.parent}", *flags]) == 1
    error = "error: checkpoint: writing of step 6 failed, the one before is untouched; rank 0: OSError: [Errno 28]"
    assert error in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-0000002", "step-0000004"]
    assert checkpoint.find(folder, ALONE).name == "step-0000004"


def test_a_copy_to_save_from_that_does_not_fit_is_refused(tiny_flags, tmp_path, monkeypatch, capsys):
    true = os.sysconf
    monkeypatch.setattr(preflight.os, "sysconf", lambda name: 1100 if name == "SC_PHYS_PAGES" else true(name))
    assert main([*tiny_flags, f"--out={tmp_path / 'run'}", "--steps=1", "--async_save=true"]) == 2
    assert "error: async_save: 0.0 GiB of memory for the copy" in capsys.readouterr().err
    assert main([*tiny_flags, f"--out={tmp_path / 'run'}", "--steps=1"]) == 0


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_stage_continues_from_every_other(train, dtype):
    common = ("--strategy=s3", "--steps=4", f"--dtype={dtype}", "--optim.lr=0.01")
    whole = losses(train("whole", *common, "--zero=1"))
    # under bf16 stage 0 accumulates gradients in bf16: another run from its first step
    for before, after in ((0, 3), (3, 2), (2, 0)) if dtype == "fp32" else ((1, 3), (3, 2)):
        name = f"from-{before}-to-{after}"
        train(name, *common, f"--zero={before}", "--stop_at=2")
        mixed = losses(train(name, *common, f"--zero={after}"))
        for step, loss in whole.items():
            assert mixed[step] == pytest.approx(loss, rel=1e-5 if dtype == "fp32" else 1e-2)


def test_what_is_kept_is_whole_tensors_shared_out_by_size(folder):
    path = folder / "step-0000004"
    facts = json.loads((path / "state.json").read_text())
    assert (facts["step"], facts["world"], facts["zero"], facts["model"]["strategy"]) == (4, 1, 1, "s3")
    tensors = {kind: checkpoint.read_tensors(path, kind) for kind in checkpoint.KINDS}
    assert {tuple(sorted(t)) for t in tensors.values()} == {tuple(sorted(tensors["master"]))}
    assert (path / FILE).stat().st_mode & 0o777 == (path / "state.json").stat().st_mode & 0o777
    assert all(t.dtype == torch.float32 for kind in tensors.values() for t in kind.values())
    assert not torch.equal(tensors["ema"]["proj_out.weight"], tensors["master"]["proj_out.weight"])


def test_a_share_larger_than_a_part_is_cut(folder, tiny_flags, monkeypatch):
    monkeypatch.setattr(checkpoint, "PART_BYTES", 20_000)
    flags = ["--steps=6", "--stop_at=5", "--strategy=s3", "--optim.lr=0.01", "--zero=1", "--keep_checkpoints=9"]
    assert main([*tiny_flags, f"--out={folder.parent}", *flags]) == 0
    path = folder / "step-0000005"
    parts = sorted(path.glob("ema-*"))
    assert len(parts) > 2
    largest = max(4 * value.numel() for value in checkpoint.read_tensors(path, "ema").values())
    assert all(part.stat().st_size < max(largest, 20_000) + 2000 for part in parts)  # 2000: the file's header
    assert checkpoint.find(folder, ALONE) == path
    assert losses(folder.parent).keys() == {1, 2, 3, 4, 5}
    assert set(checkpoint.read_tensors(path, "ema")) == set(checkpoint.read_tensors(folder / "step-0000004", "ema"))


def test_a_run_rolled_back_keeps_what_it_writes(folder, tiny_flags):
    """`latest` by hand on an older one, --keep_checkpoints=1: what is newer by name must not push out what is saved."""
    (folder / "latest").write_text("step-0000002\n")
    (folder / "partial-step-0000009").mkdir()
    flags = ["--steps=6", "--stop_at=3", "--strategy=s3", "--optim.lr=0.01", "--zero=1", "--keep_checkpoints=1"]
    assert main([*tiny_flags, f"--out={folder.parent}", *flags]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-0000003", "step-0000004"]
    assert checkpoint.find(folder, ALONE).name == "step-0000003"
