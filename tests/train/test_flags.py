"""Configuration: presets, flags, and one clear line for whatever cannot be used."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from train.config import Config, ConfigError
from train.flags import parse, presets
from train.run import main

ROOT = Path(__file__).parent.parent.parent


def test_the_demo_is_the_default_and_flags_win_over_presets():
    config = parse([])
    assert (config.preset, config.strategy, config.text.llm, config.zero) == ("demo", "s3", "smollm2", 1)
    config = parse(["--strategy", "s2", "--zero", "3", "--optim.betas", "[0.8, 0.9]", "--local_rank=1"])
    assert (config.strategy, config.zero, config.optim.betas) == ("s2", 3, (0.8, 0.9))
    assert config.optim.schedule == "cosine"  # the preset's, untouched


def test_the_paper_preset_is_section_4_1(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "index.json").write_text("{}")
    config = parse(["--preset", "paper-256", f"--data.path={tmp_path}"])
    optim = config.optim
    assert (config.model.size, config.text.llm) == ("paper", "Qwen/Qwen3-VL-4B-Instruct")
    assert (config.batch_size, config.steps, config.flow.prompt_drop) == (512, 500_000, 0.1)
    assert (optim.lr, optim.betas, optim.weight_decay, optim.schedule) == (1e-4, (0.9, 0.999), 1e-4, "constant")
    assert (config.text.max_tokens, config.eval.steps, config.eval.guidance) == (512, 50, 6.0)
    assert (config.flow.shift, optim.clip, optim.ema) == (3.0, 1.0, 0.9999)
    assert presets() == ["demo", "paper-256", "paper-512"]


def test_the_saved_configuration_reads_back(tmp_path):
    config = parse(["--strategy=b1", "--optim.lr=0.01", "--micro_batch_size=4"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


BAD = [
    (["--strategy", "s9"], "strategy: wanted one of b1, b2, b3, s1, s2, s3, fusedit, got s9"),
    (["--stratgy", "s3"], "--stratgy: unknown flag, did you mean --strategy?"),
    (["--optim.lrr=1"], "--optim.lrr: unknown flag, did you mean --optim.lr?"),
    (["--optim.lr", "nan"], "optim.lr: wanted a number, got nan"),
    (["--optim.lr", ".nan"], "optim.lr: wanted a finite number above 0, got nan"),
    (["--optim.lr=0"], "optim.lr: wanted a finite number above 0, got 0"),
    (["--zero=4"], "zero: wanted one of 0, 1, 2, 3, got 4"),
    (["--steps=1.5"], "steps: wanted a whole number, got 1.5"),
    (["--steps=-1"], "steps: wanted a finite number above 0, got -1"),
    (["--flow.prompt_drop=1.5"], "flow.prompt_drop: wanted a number from 0 to 1, got 1.5"),
    (["--optim.betas=[0.9, 1.0]"], "optim.betas: wanted two numbers from 0 to below 1"),
    (["--data.workers=-1"], "data.workers: wanted 0 or more, got -1"),
    (["--preset=huge"], "preset: wanted one of demo, paper-256, paper-512, got 'huge'"),
    (["--preset=paper-256", "--data.path=/nowhere"], "data.path: wanted a folder with train/index.json"),
    (["--eval.prompts=/nowhere.txt"], "eval.prompts: wanted a .txt or .jsonl file"),
    (["--data.shapes_samples=5"], "data.shapes_captions: wanted at most data.shapes_samples=5, got 400"),
    (["--data.captions=caption"], "data.captions: wanted NAME=WEIGHT,..., got 'caption'"),
    (["--data.captions=caption=-1"], "data.captions: wanted names, each with a finite weight above 0"),
    (["--data.captions={}"], "data.captions: wanted names, each with a finite weight above 0"),
    (["--data.mix=a=nan"], "data.mix: wanted a number, got NaN"),
    (["stray"], "unrecognized arguments: stray"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_a_bad_setting_is_one_line_and_exit_code_2(flags, message, capsys):
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"error: .*\n", printed.err)
    assert message in printed.err


def test_an_unknown_key_in_a_file_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("optim:\n  lrr: 3\n")
    with pytest.raises(ConfigError, match="lrr"):
        parse(["--config", str(tmp_path / "c.yaml")])


def test_settings_that_need_the_parts_to_be_known(tiny_flags, tmp_path, capsys):
    for flags, message in (
        (["--data.image_size=30"], "data.image_size: wanted a multiple of 4 (patch 4 x latent factor 1), got 30"),
        (["--data.image_size=64"], "data.image_size: wanted 64x64 images, the shards hold 32x32"),
        (["--model.size=huge"], "model.size: wanted one of paper, demo, got 'huge'"),
        (["--model.num_kv_heads=3"], "model.num_heads: wanted a multiple of num_kv_heads=3, got 4"),
        (["--model.text_layers=36"], "text.llm: wanted 36 layers (model.text_layers)"),
        (["--text.llm=/nowhere"], "text.llm: "),
        (["--data.vae=/nowhere"], "data.vae: wanted a diffusers AutoencoderKL or 'pixels'"),
        (["--micro_batch_size=3"], "batch_size: wanted a multiple of 1 ranks x micro_batch_size 3, got 8"),
    ):
        assert main([*tiny_flags, f"--out={tmp_path}", *flags]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error


def test_help_explains_every_flag_and_needs_no_torch():
    code = "import sys, train.run as r\ntry: r.main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "ZeRO stage" in out
    for section in ("model", "text", "data", "optim", "flow", "eval"):
        for name in vars(getattr(Config(), section)):
            assert re.search(rf"--{section}\.{name}\b.*\n?.*\w", out), name
