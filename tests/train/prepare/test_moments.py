"""The moments column against diffusers' own encode, on a small random AutoencoderKL."""

import io
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from streaming import MDSWriter, StreamingDataset

from sr_model.codec import VaeCodec
from train.prepare import prepare_shapes
from train.prepare.__main__ import main


def make_vae(seed=0):
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=0.1,
    )


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    make_vae().save_pretrained(folder)
    return folder


def pixels(data):
    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1).copy())


def read(folder):
    return list(StreamingDataset(local=str(folder), shuffle=False, batch_size=1))


def test_moments_are_diffusers_own(vae_folder, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    flags = [f"--source={corpus}", f"--vae={vae_folder}", f"--out={out}", "--device=cpu"]
    assert main(["moments", *flags, "--batch-size=7"]) == 0
    vae = AutoencoderKL.from_pretrained(vae_folder)
    for split, count in (("train", 40), ("val", 6)):
        found, before = read(out / split), read(corpus / split)
        assert len(found) == count
        for sample, old in zip(found, before, strict=True):
            moments = sample.pop("moments")
            assert sample == old
            assert (moments.dtype, moments.shape) == (np.float16, (8, 16, 16))
            with torch.no_grad():
                dist = vae.encode(pixels(old["image"])[None].float() / 127.5 - 1).latent_dist
            wanted = torch.cat([dist.mean, dist.logvar], 1)[0].numpy()
            np.testing.assert_allclose(moments, wanted, rtol=2**-10, atol=1e-4)  # fp16's rounding
        index = json.loads((out / split / "index.json").read_text())
        assert index["moments"] == {"vae": str(vae_folder), "encoder": VaeCodec(vae).fingerprint()}
    assert main(["moments", *flags, "--batch-size=3"]) == 0  # finished, whatever the batch size
    assert "is finished" in capsys.readouterr().err


def test_the_image_can_be_left_out(vae_folder, corpus, tmp_path):
    flags = [f"--source={corpus}", f"--vae={vae_folder}", f"--out={tmp_path / 'out'}"]
    assert main(["moments", *flags, "--drop-image", "--compression=zstd"]) == 0
    assert {tuple(sorted(s)) for s in read(tmp_path / "out" / "train")} == {("caption", "meta", "moments")}
    assert (tmp_path / "out" / "prompts.jsonl").read_bytes() == (corpus / "prompts.jsonl").read_bytes()


def test_pictures_of_several_sizes(vae_folder, tmp_path):
    sizes = [(16, 8), (16, 8), (8, 16), (16, 8)]
    with MDSWriter(out=str(tmp_path / "in" / "train"), columns={"image": "bytes", "caption": "str"}) as writer:
        for width, height in sizes:
            file = io.BytesIO()
            Image.new("RGB", (width, height), "red").save(file, "PNG")
            writer.write({"image": file.getvalue(), "caption": ""})
    flags = [f"--source={tmp_path / 'in'}", f"--vae={vae_folder}", f"--out={tmp_path / 'out'}"]
    assert main(["moments", *flags]) == 0
    assert [s["moments"].shape for s in read(tmp_path / "out" / "train")] == [(8, h // 2, w // 2) for w, h in sizes]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vae=/nowhere"], "vae: wanted a diffusers AutoencoderKL, got '/nowhere'"),
        (["--batch-size=0"], "batch-size: wanted 1 or more, got 0"),
        (["--device=abacus"], "device: wanted a device torch can use, got 'abacus'"),
    ],
)
def test_a_bad_argument_is_one_line(vae_folder, corpus, tmp_path, capsys, flags, message):
    command = ["moments", f"--source={corpus}", f"--out={tmp_path / 'out'}", f"--vae={vae_folder}", *flags]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_side_the_vae_cannot_take_is_named(vae_folder, tmp_path, capsys):
    prepare_shapes(tmp_path / "in", samples=2, captions=1, size=33, val=1, prompts=1, progress=False)
    capsys.readouterr()
    flags = [f"--source={tmp_path / 'in'}", f"--vae={vae_folder}", f"--out={tmp_path / 'out'}"]
    assert main(["moments", *flags]) == 1
    assert "train/00000, sample 0: wanted sides that are multiples of 2, got 33x33" in capsys.readouterr().err


def test_a_fingerprint_is_the_encoders_whatever_the_dtype():
    one, other = make_vae(0), make_vae(1)
    mark = VaeCodec(one).fingerprint()
    assert VaeCodec(make_vae(0).to(torch.bfloat16)).fingerprint() == mark
    assert VaeCodec(other).fingerprint() != mark
    other.encoder.load_state_dict(one.encoder.state_dict())  # another decoder makes the same moments
    assert VaeCodec(other).fingerprint() == mark


def test_sampling_from_moments_is_encoding():
    codec = VaeCodec(make_vae())
    images, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    posterior = codec.vae.encode(images).latent_dist
    wanted = (posterior.mean + posterior.std * noise - 0.1) * 1.5
    assert torch.equal(codec.sample(codec.moments(images), noise), wanted)
    assert torch.equal(codec.encode(images, noise), wanted)
