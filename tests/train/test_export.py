"""A checkpoint of any stage exports what the run itself exports, and its last weights are those that train."""

import shutil

import deepspeed
import pytest
import torch

from sr_model import SemanticRoutingPipeline
from tests.train.test_checkpoint import flip
from train import checkpoint, loop
from train.export import main


@pytest.fixture
def no_ranks(monkeypatch):
    """Exporting needs no process group and no engine."""

    def refused(*_, **__):
        raise AssertionError("begun")

    for module, name in ((deepspeed, "initialize"), (deepspeed, "init_distributed")):
        monkeypatch.setattr(module, name, refused)
    monkeypatch.setattr(torch.distributed, "init_process_group", refused)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("zero", "dtype", "strategy"), [(0, "fp32", "s2"), (1, "bf16", "s3"), (2, "fp32", "fusedit"), (3, "bf16", "b1")]
)
def test_it_writes_what_the_run_itself_writes(train, tmp_path, zero, dtype, strategy, request):
    flags = (f"--zero={zero}", f"--dtype={dtype}", f"--strategy={strategy}", "--steps=2", "--optim.lr=0.01")
    folder = train("run", *flags, "--export=true", "--text.template=a red", "--text.max_tokens=9", "--flow.shift=2.5")
    request.getfixturevalue("no_ranks")
    assert main([str(folder), str(tmp_path / "out")]) == 0
    theirs, mine = content(folder / "pipeline"), content(tmp_path / "out")
    assert theirs.keys() == mine.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []
    pipe = SemanticRoutingPipeline.from_pretrained(tmp_path / "out")
    assert (pipe.config.prompt_template, pipe.config.max_prompt_tokens) == ("a red", 9)
    assert pipe.scheduler.config.shift == 2.5


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_its_last_weights_give_the_velocity_of_training(train, tmp_path, monkeypatch, zero):
    seen, finish = [], loop.finish

    def look(evaluator, parts, *rest):
        x, t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
        text = parts.encoder.encode(["a red circle", "two green squares"])
        with torch.no_grad():
            seen.extend((x, t, text, parts.engine(x, t, text)))
        finish(evaluator, parts, *rest)

    monkeypatch.setattr(loop, "finish", look)
    folder = train("run", f"--zero={zero}", "--steps=3", "--optim.lr=0.01", "--strategy=s3")
    assert main([str(folder / "checkpoints" / "step-0000003"), str(tmp_path / "out"), "--weights=master"]) == 0
    x, t, text, velocity = seen
    model = SemanticRoutingPipeline.from_pretrained(tmp_path / "out").transformer
    with torch.no_grad():
        assert torch.equal(model(x, t, text), velocity)
    assert velocity.abs().max() > 0


def test_what_is_broken_or_missing_is_refused_by_name(train, tmp_path, capsys):
    folder, out = train("run", "--steps=2"), tmp_path / "out"
    broken = shutil.copytree(folder / "checkpoints" / "step-0000002", tmp_path / "step-0000002")
    flip(broken / "ema-000-00000-of-00001.safetensors", 2000)
    shutil.copytree(broken, tmp_path / "cut" / "step-0000002")
    (tmp_path / "cut" / "step-0000002" / "manifest.json").unlink()
    for source, message in (
        (broken, "ema-000-00000-of-00001.safetensors is not what was written"),
        (tmp_path / "cut", "step-0000002/manifest.json is missing"),
        (tmp_path / "nowhere", "source: wanted a run or a checkpoint, found no step-* in"),
    ):
        assert main([str(source), str(out)]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("")
    assert main([str(folder), str(out)]) == 2
    assert "error: out: wanted a new or empty folder" in capsys.readouterr().err
    assert checkpoint.fault(folder / "checkpoints" / "step-0000002") is None
