"""Which checkpoint is found, and what cannot be continued from it."""

import shutil

from train.checkpoint import newest
from train.run import main


def test_latest_is_followed_and_without_it_the_newest_complete_folder_is_found(tmp_path):
    assert newest(tmp_path) is None
    for name in ("step-0000002", "step-0000010", "partial-step-0000012"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest").write_text("step-0000002\n")
    assert newest(tmp_path).name == "step-0000002"
    for broken in ("", "\n", "step-0000099\n"):
        (tmp_path / "latest").write_text(broken)
        assert newest(tmp_path).name == "step-0000010"
    (tmp_path / "latest").unlink()
    assert newest(tmp_path).name == "step-0000010"


def test_only_the_newest_checkpoints_are_kept(train):
    folder = train("run", "--steps=5", "--checkpoint_every=1", "--keep_checkpoints=2")
    folders = sorted(p.name for p in (folder / "checkpoints").iterdir() if p.is_dir())
    assert folders == ["step-0000004", "step-0000005"]
    assert (folder / "checkpoints" / "latest").read_text() == "step-0000005\n"


def test_another_stage_or_number_of_ranks_is_refused_by_name(train, tiny_flags, capsys):
    folder = train("run", "--steps=4", "--stop_at=2", "--zero=2")
    flags = [*tiny_flags, f"--out={folder}", "--steps=4"]
    assert main([*flags, "--zero=3"]) == 2
    assert "was saved at ZeRO stage 2, got --zero 3" in capsys.readouterr().err
    step = folder / "checkpoints" / "step-0000002"
    shutil.copy(step / "ema-rank00000.pt", step / "ema-rank00001.pt")
    assert main([*flags, "--zero=2"]) == 2
    assert "was saved on 2 ranks, this run has 1" in capsys.readouterr().err
