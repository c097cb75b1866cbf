"""What a run checks before it allocates: memory, and the micro-batch that fits into it."""

import re
from types import SimpleNamespace

import pytest
import torch

from sr_model import build
from train import preflight
from train.config import Config, ConfigError
from train.distributed import Ranks
from train.run import main


def test_a_model_that_cannot_fit_is_refused_before_it_is_made(tiny_flags, tmp_path, capsys):
    assert main([*tiny_flags, f"--out={tmp_path / 'run'}", "--model.mlp_size=2000000000"]) == 2
    message = capsys.readouterr().err
    assert re.search(
        r"error: model: [\d,]+ parameters need \d+ GiB of weights and optimiser on each of 1 ranks", message
    )
    assert "take a higher --zero" in message


def test_the_micro_batch_is_what_fits():
    """6 GiB are there at every step, a sample takes 1.5, of 20; by hand."""
    need = preflight.Memory(6 << 30, 3 << 29, 20 << 30)
    ranks = Ranks(0, 2, 0, torch.device("cpu"))

    def chosen(batch, micro=None):
        return preflight.micro_batch(Config(batch_size=batch, micro_batch_size=micro), ranks, need, 7)

    assert [chosen(batch) for batch in (2, 16, 20, 22, 48, 64)] == [1, 8, 5, 1, 8, 8]  # at most 8 of a rank's share
    assert chosen(64, 4) == 4
    for batch, micro, message in (
        (3, None, "batch_size: wanted a multiple of 2 ranks x micro_batch_size at least 1, got 3"),
        (1, None, "batch_size: wanted a multiple of 2 ranks"),
        (64, 16, "micro_batch_size: 16 samples need about 24 GiB beside the 6 GiB of weights and optimiser, of 20 GiB"),
    ):
        with pytest.raises(ConfigError, match=message):
            chosen(batch, micro)


@pytest.mark.parametrize(("side", "world", "checkpointing", "micro"), [
    (256, 8, "none", 32), (256, 64, "none", 8), (512, 8, "selective", 16), (512, 8, "none", 8)
])  # fmt: skip
def test_the_paper_presets_fit_80_gib(monkeypatch, side, world, checkpointing, micro):
    """Of a batch of 512; 9 GB of LLM and VAE stand beside."""
    room = SimpleNamespace(total_memory=79 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: room)
    config = Config(batch_size=512, zero=2, gradient_checkpointing=checkpointing)
    ranks, model = Ranks(0, world, 0, torch.device("cuda")), build("s3", "paper", "meta")
    need = preflight.memory(config, ranks, model, 8, torch.bfloat16, 9 << 30, [(side, side)])
    assert preflight.micro_batch(config, ranks, need, 7) == micro
