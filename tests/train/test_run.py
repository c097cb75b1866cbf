"""The training program end to end, on one process and under the launcher."""

import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sr_model import STRATEGIES, SemanticRoutingPipeline, build
from sr_model.flops import forward as flops_of
from tests.train.conftest import SIZES
from train import runlog
from train.disk import alone
from train.run import main

ROOT = Path(__file__).parent.parent.parent


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def validation(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_by_its_name_alone(train, strategy):
    folder = train("run", f"--strategy={strategy}", "--steps=3", "--optim.lr=0.01")
    assert list(losses(folder)) == [1, 2, 3]
    assert validation(folder)[3] < validation(folder)[0]
    for name in ("config.yaml", "samples.png", "loss.png", "summary.json", "checkpoints/latest"):
        assert (folder / name).stat().st_size > 0
    assert Image.open(folder / "samples.png").size[0] > 2 * 128


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_repeats_the_unbroken_one_to_the_bit(train, zero, dtype):
    common = ("--strategy=s3", "--steps=6", f"--zero={zero}", f"--dtype={dtype}", "--optim.lr=0.01")
    whole = train("whole", *common)
    train("broken", *common, "--stop_at=2")
    broken = train("broken", *common, "--stop_at=5")  # 5 x 8 samples: the end of the epoch of 40
    assert not (broken / "summary.json").exists()
    broken = train("broken", *common)
    assert losses(broken) == losses(whole)
    assert validation(broken)[6] == validation(whole)[6]  # the moving average too
    assert np.array_equal(*(np.asarray(Image.open(f / "samples.png")) for f in (whole, broken)))


def test_zero_stages_and_micro_batches_agree(train):
    """Draws belong to samples, so how a batch is cut changes rounding alone."""
    one = losses(train("one", "--steps=3", "--zero=0"))
    for name, flags in (("z1", ["--zero=1"]), ("z3", ["--zero=3"]), ("micro", ["--micro_batch_size=2"]),
                        ("recompute", ["--gradient_checkpointing=full"])):  # fmt: skip
        other = losses(train(name, "--steps=3", *flags))
        assert all(math.isclose(one[s], other[s], rel_tol=1e-5) for s in one), (name, one, other)


@pytest.mark.parametrize("strategy", ["b1", "b2", "fusedit"])
def test_strategies_that_learn_no_weights_train_alike_under_zero_3(train, strategy):
    one, other = (losses(train(f"z{z}", "--steps=3", f"--zero={z}", f"--strategy={strategy}")) for z in (1, 3))
    assert all(math.isclose(one[s], other[s], rel_tol=1e-5) for s in one), (one, other)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_no_buffer_is_larger_than_the_model(train, capsys, monkeypatch, zero):
    """DeepSpeed would make one of 2 GB for gradients; a fork can be refused for it, and a GPU has to find it."""
    sizes, empty = [], torch.empty

    def spy(*args, **kwargs):
        made = empty(*args, **kwargs)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(torch, "empty", spy)
    train("run", "--steps=1", f"--zero={zero}")
    parameters = int(re.search(r"([\d,]+) parameters", capsys.readouterr().out)[1].replace(",", ""))
    assert 0 < max(sizes) <= parameters


@pytest.mark.slow  # compiles for half a minute
@pytest.mark.parametrize("zero", [0, 3])
def test_compiled_blocks_train_alike_at_any_stage(train, zero):
    one = losses(train("one", "--steps=3", "--zero=0"))
    flags = [f"--zero={zero}", "--compile=true", "--gradient_checkpointing=selective"]
    other = losses(train("compiled", "--steps=3", *flags))
    assert all(math.isclose(one[s], other[s], rel_tol=1e-5) for s in one)


def test_the_moving_average_is_the_recurrence(train):
    from train import engine

    seen = []
    update = engine.Ema.update

    def spy(self):
        update(self)
        seen.append((engine.full_master_state(self.engine), self.full_state()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Ema, "update", spy)
        train("run", "--steps=4", "--zero=3", "--optim.ema=0.3", "--optim.lr=0.01", "--seed=3")
    (_, expected), *later = seen
    for n, (weights, average) in enumerate(later, 1):
        decay = min(0.3, (1 + n) / (10 + n))
        expected = {k: decay * expected[k] + (1 - decay) * weights[k] for k in expected}
        for name, value in average.items():
            assert torch.allclose(value, expected[name], atol=1e-6), name


def test_a_finished_run_is_reused_and_says_so(train, capsys):
    folder = train("run", "--steps=2")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()
    train("run", "--steps=2")
    assert "finished before; reusing" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_a_folder_with_a_run_is_not_overwritten(train, tiny_flags, capsys):
    folder = train("run", "--steps=2")
    assert main([*tiny_flags, f"--out={folder}", "--steps=2", "--resume=false"]) == 2
    assert "out: " in capsys.readouterr().err
    for flag, message in (("--strategy=b3", "strategy: the run in"), ("--model.depth=1", "model: the run in")):
        assert main([*tiny_flags, f"--out={folder}", "--steps=3", flag]) == 2
        assert message in capsys.readouterr().err


def test_a_run_goes_on_past_where_it_was_told_to_stop_and_is_then_finished(train, capsys):
    folder = train("run", "--steps=4", "--stop_at=2")
    assert yaml.safe_load((folder / "config.yaml").read_text())["stop_at"] == 2
    train("run", "--steps=4", "--data.workers=1")
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["workers"] == 1  # what was used last
    before = (folder / "summary.json").read_text()
    capsys.readouterr()
    train("run", "--steps=4", "--data.workers=1", "--stop_at=3")
    assert "finished before; reusing" in capsys.readouterr().out
    assert (folder / "summary.json").read_text() == before


def test_a_line_that_a_full_disk_cut_is_left_out(train):
    whole = losses(train("whole", "--steps=4"))
    folder = train("run", "--steps=4", "--stop_at=2")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    train("run", "--steps=4")
    assert losses(folder) == whole


def test_one_run_at_a_time_in_a_folder(train, tiny_flags, capsys):
    folder = train("run", "--steps=4", "--stop_at=2")
    with alone(folder / ".lock", AssertionError("somebody holds it")):
        assert main([*tiny_flags, f"--out={folder}", "--steps=4"]) == 2
    assert f"out: another process trains in {folder}" in capsys.readouterr().err
    train("run", "--steps=4")


def test_a_full_disk_is_one_line(tiny_flags, tmp_path, monkeypatch, capsys):
    def write(self, row):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(runlog.RunLog, "write", write)
    assert main([*tiny_flags, f"--out={tmp_path / 'run'}", "--steps=2"]) == 1
    assert "error: metrics.jsonl: No space left on device\n" in capsys.readouterr().err


def test_long_captions_are_cut_and_counted(train):
    rows = (train("run", "--steps=2", "--text.max_tokens=2") / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(row) for row in rows if "truncated_captions" in row][-1]
    assert last["truncated_captions"] > 0
    assert last["text_tokens_per_image"] <= 2


def test_the_exported_pipeline_draws_the_runs_own_pictures(train):
    folder = train("run", "--steps=2", "--export=true", "--eval.score=3", "--eval.steps=2")
    summary = json.loads((folder / "summary.json").read_text())
    assert sum(split["count"] for split in summary["score"].values()) == 3
    pipe = SemanticRoutingPipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.default_size == 32
    image = pipe("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (32, 32)


def launch(*flags):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "train/run.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks the launcher for CPU ranks")
def test_two_ranks_under_the_launcher_end_with_the_same_files(train, tiny_flags, tmp_path):
    flags = ["--strategy=s2", "--zero=3", "--steps=3", "--micro_batch_size=4"]
    alone = train("alone", *flags, "--export=true")
    together = tmp_path / "together"
    done = launch(*tiny_flags, *flags, "--export=true", f"--out={together}")
    assert done.returncode == 0, done.stdout + done.stderr

    def names(folder):
        ranks = ("rank", "checkpoints")
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if not any(w in str(p) for w in (*ranks, "tfev"))}

    assert names(together) == names(alone)
    assert set(losses(together)) == {1, 2, 3}
    assert math.isclose(validation(together)[0], validation(alone)[0], rel_tol=1e-6)


def test_arithmetic_and_fusion_weights_are_logged(train):
    rows = [json.loads(line) for line in (train("run", "--steps=2", "--strategy=s3") / "metrics.jsonl").open()]
    steps = [row for row in rows if "loss" in row]
    assert not any("mfu" in row for row in steps)  # a CPU has no peak to compare with
    model = build("s3", "demo", "meta", text_dim=24, text_layers=4, **SIZES)
    for row in steps:  # 8 pictures of 32 x 32 pixels; the counts are linear in the prompts' lengths
        tokens, seconds = round(row["text_tokens_per_image"] * 8), 8 / row["images_per_s"]
        flops = 3 * flops_of(model, (32 // model.config.patch_size) ** 2, [1] * 7 + [tokens - 7]).total
        assert row["tflop_per_s"] * 1e12 * seconds == pytest.approx(flops, rel=1e-6)
    assert steps[-1]["llm_tflop_total"] > 0
    last = next(row for row in reversed(rows) if "val_loss" in row)
    for d in range(model.config.depth):
        assert last[f"fusion_centre_block{d}"] == pytest.approx(0.5, abs=0.05)  # two small steps from uniform weights
        assert last[f"fusion_dispersion_block{d}"] == pytest.approx(5 / 36, abs=0.02)


def test_the_process_ends_with_its_code_whatever_its_threads_do():
    """PyTorch aborts the process where the interpreter, at its end, stops a thread that frees a tensor."""
    program = """
import atexit, threading, torch
from train.run import leave
def work():
    while True:
        torch.ones(64) + 1
        begun.set()
begun = threading.Event()
atexit.register(print, "left")
threading.Thread(target=work, daemon=True).start()
begun.wait()
leave(3)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "left\n"), done.stderr
