"""A tiny run's surroundings: the random Llama as a folder, a small shapes corpus, the flags that name them."""

import pytest
import torch

from train.distributed import Ranks
from train.prepare import prepare_shapes
from train.run import main

SIZES = {"depth": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_size": 48}


@pytest.fixture(scope="session")
def llm_folder(llm, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "shapes"
    prepare_shapes(folder, samples=40, captions=20, val=6, prompts=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def tiny_flags(llm_folder, corpus):
    """Flags of a run that takes a second: fp32, batch 8, every step logged, next to nothing drawn."""
    flags = [f"--model.{name}={value}" for name, value in SIZES.items()]
    flags += [f"--text.llm={llm_folder}", f"--data.path={corpus}", "--data.shapes_samples=0"]
    flags += ["--dtype=fp32", "--batch_size=8", "--log_every=1", "--optim.warmup_steps=2", "--export=false"]
    return [*flags, "--eval.val_samples=4", "--eval.grid=2", "--eval.steps=1", "--eval.score=0", "--eval.every=0"]


@pytest.fixture(autouse=True)
def linear(monkeypatch):
    """ZeRO-3 puts its own in place of torch's and leaves it there; later tests count torch's operations."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


@pytest.fixture
def train(tiny_flags, tmp_path):
    """A function (name, *flags) -> folder of a finished run; flags override the tiny ones."""

    def run(name, *flags):
        assert main([*tiny_flags, f"--out={tmp_path / name}", *flags]) == 0
        return tmp_path / name

    return run


@pytest.fixture
def ranks_alone():
    """One rank on the CPU."""
    return Ranks(0, 1, 0, torch.device("cpu"))
