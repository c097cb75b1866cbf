"""The training step's benchmark at a tiny size: the program's own step, by our path and by the plain one."""

import json
from argparse import Namespace

import pytest
import torch

from bench import provenance, tables, throughput
from bench.setting import PAPER, language_model
from tests.bench.test_overhead import TINY
from train.distributed import Ranks
from train.runlog import PARTS


def test_a_step_is_measured_by_both_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "REDUCED", TINY)
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    flags = [
        "--strategies",
        "s3",
        "fusedit",
        "--plain",
        "s3",
        "--tokens=3",
        "--micro-batch=2",
        "--steps=2",
        "--warmup=0",
    ]
    assert throughput.main([*flags, f"--trace={tmp_path / 'trace'}"]) == 0
    (path,) = tmp_path.glob("throughput-*.json")
    result = json.loads(path.read_text())
    assert [(row["strategy"], row["path"]) for row in result["rows"]] == [
        ("s3", "ours"), ("fusedit", "ours"), ("s3", "plain")
    ]  # fmt: skip
    for row in result["rows"]:
        assert all(row["seconds_by_part"][part] > 0 for part in PARTS)
        assert row["images_per_s"] == pytest.approx(2 / row["seconds"])
    first, fused, plain = result["rows"]
    assert first["tflop_per_s"] * first["seconds"] == pytest.approx(plain["tflop_per_s"] * plain["seconds"], rel=0.2)
    assert first["seconds_by_part"]["conditioner, within forward"] > 0
    assert fused["seconds_by_part"]["conditioner, within forward"] == 0
    assert json.loads((tmp_path / "trace.s3.json").read_text())["traceEvents"]
    assert len(tables.throughput_table(result).splitlines()) == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--micro-batch=0"], "--micro-batch: wanted at least 1, got 0"),
        (["--zero=3"], "--zero: wanted 0 to 2 with --plain"),
    ],
)
def test_arguments_are_checked(capsys, flags, message):
    with pytest.raises(SystemExit):
        throughput.main(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("gib", "plain", "micro"), [(140, ["s2"], 32), (79, ["s2"], 8), (79, [], 16)])
def test_the_micro_batch_is_what_fits_a_gpu(monkeypatch, gib, plain, micro):
    """At full size: 53 GiB of weights, optimiser and LLM, and 0.94 GiB a picture, twice that by the plain path."""
    arguments = Namespace(zero=2, gradient_checkpointing="none", plain=plain)
    ranks = Ranks(0, 1, 0, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Namespace(total_memory=gib << 30))
    llm = language_model(PAPER, torch.device("meta"), torch.bfloat16)
    assert throughput.fitting(arguments, ranks, llm) == micro
