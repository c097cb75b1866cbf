"""Training on moments, several caption columns, mixed corpora and aspect buckets."""

import json
import math

import pytest
import torch
from diffusers import AutoencoderKL

from tests.train.data.test_corpora import write
from tests.train.prepare.test_moments import make_vae
from tests.train.test_run import launch, losses, validation
from train.prepare.__main__ import main as prepare
from train.run import main


@pytest.fixture(scope="module")
def encoded(corpus, tmp_path_factory):
    """(VAE folder, the shapes corpus with its moments)."""
    folder = tmp_path_factory.mktemp("encoded")
    make_vae().save_pretrained(folder / "vae")
    flags = [f"--source={corpus}", f"--vae={folder / 'vae'}", "--device=cpu"]
    assert prepare(["moments", *flags, f"--out={folder / 'both'}"]) == 0
    assert prepare(["moments", *flags, f"--out={folder / 'bare'}", "--drop-image"]) == 0
    return folder / "vae", folder


def test_moments_train_as_the_images_do_and_the_encoder_is_not_run(train, encoded, corpus, monkeypatch):
    vae, folder = encoded
    common = (f"--data.vae={vae}", "--steps=6", "--optim.lr=0.01")  # 6 x 8 samples: into the second epoch of 40
    images = train("images", *common)

    def encode(*_):
        raise AssertionError("the VAE's encoder ran")

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    moments = train("moments", *common, f"--data.path={folder / 'bare'}")
    for read in (losses, validation):
        a, b = read(images), read(moments)
        assert set(a) == set(b)
        assert all(math.isclose(a[s], b[s], rel_tol=2**-10) for s in a), (a, b)  # fp16's rounding
    assert (moments / "samples.png").stat().st_size > 0  # drawn with the decoder


def test_the_posterior_is_sampled_anew(encoded, train, monkeypatch):
    from train import loop

    seen = []
    real = loop.to_latents

    def spy(codec, data, noise):
        seen.append((data, noise, real(codec, data, noise)))
        return seen[-1][2]

    monkeypatch.setattr(loop, "to_latents", spy)
    vae, folder = encoded
    train("run", f"--data.vae={vae}", "--steps=2", f"--data.path={folder / 'both'}")
    for data, noise, latents in seen:
        assert data.dtype == torch.float16
        mean, logvar = data.float().chunk(2, 1)
        assert torch.allclose(latents, (mean + (logvar / 2).exp() * noise - 0.1) * 1.5, atol=1e-6)
    assert not torch.equal(seen[0][1], seen[1][1])


def test_the_wrong_vae_and_missing_images_are_refused(encoded, tiny_flags, tmp_path, capsys):
    _, folder = encoded
    make_vae(1).save_pretrained(tmp_path / "other")
    for flags, message in (
        ([f"--data.path={folder / 'both'}", f"--data.vae={tmp_path / 'other'}"], "data.vae: wanted the VAE that made"),
        ([f"--data.path={folder / 'bare'}"], "data.path: wanted a column image in"),
        ([f"--data.path={folder / 'both'}", "--data.captions=recaption=1"], "wanted a column 'recaption', got ["),
    ):
        assert main([*tiny_flags, f"--out={tmp_path / 'run'}", *flags]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora in aspect buckets, with two caption columns."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, counts in (("a", {"32x16": 20, "16x32": 12}), ("b", {"32x16": 9})):
        for split in ("train", "val"):
            for bucket, count in counts.items():
                size = tuple(map(int, bucket.split("x")))
                write(folder / name / split / bucket, f"{name} {bucket}", count, size, ("caption", "recaption"))
    return folder


@pytest.fixture(scope="module")
def mixed(corpora):
    """Flags of a run on all of it."""
    mix = json.dumps({str(corpora / "a"): 2.0, str(corpora / "b"): 1.0})
    return [f"--data.path={corpora / 'a'}", f"--data.mix={mix}", "--data.captions=caption=1,recaption=3"]


def test_buckets_mix_and_captions_resume_to_the_bit(train, mixed, corpora, capsys):
    common = [*mixed, "--steps=7", "--optim.lr=0.01", "--micro_batch_size=4"]
    whole = train("whole", *common)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("data "))
    assert "41 samples in 4 shards" in line
    assert f"mixed {corpora / 'a'} 66.7%, {corpora / 'b'} 33.3%" in line
    assert "sizes 16x32 12, 32x16 29" in line
    assert "captions caption 25%, recaption 75%" in line
    train("broken", *common, "--stop_at=3")
    broken = train("broken", *common)
    assert losses(broken) == losses(whole)
    assert validation(broken)[7] == validation(whole)[7]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks the launcher for CPU ranks")
def test_two_ranks_train_on_the_same_batches(train, mixed, tiny_flags, tmp_path):
    flags = [*mixed, "--steps=4", "--micro_batch_size=4", "--zero=1"]
    alone = losses(train("alone", *flags))
    done = launch(*tiny_flags, *flags, f"--out={tmp_path / 'together'}")
    assert done.returncode == 0, done.stdout + done.stderr
    together = losses(tmp_path / "together")
    assert set(together) == set(alone) == {1, 2, 3, 4}
    assert all(math.isclose(alone[s], together[s], rel_tol=1e-5) for s in alone), (alone, together)
