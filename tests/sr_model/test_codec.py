"""Latent codecs: pixels, and a small random AutoencoderKL against diffusers' own calls."""

import pytest
import torch
from diffusers import AutoencoderKL

from sr_model.codec import PixelCodec, VaeCodec, to_uint8


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )


def test_sd3_latents_are_shifted_and_scaled(vae):
    codec = VaeCodec(vae)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = codec.encode(images)
    mode = vae.encode(images).latent_dist.mode()
    assert latents.shape == (2, *codec.latent_shape(32, 48)) == (2, 16, 4, 6)
    assert torch.allclose(latents, (mode - 0.0609) * 1.5305, atol=1e-6)
    assert torch.allclose(codec.decode(latents), vae.decode(mode).sample, atol=1e-5)


def test_posterior_noise_moves_latents_by_the_posterior_deviation(vae):
    codec = VaeCodec(vae)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    noise = torch.randn(1, 16, 2, 2)
    posterior = vae.encode(images).latent_dist
    assert torch.allclose(codec.encode(images, noise) - codec.encode(images), posterior.std * noise * 1.5305, atol=1e-5)


def test_pixels_pass_through_and_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    codec = PixelCodec()
    assert torch.equal(to_uint8(codec.decode(codec.encode(pixels.float() / 127.5 - 1))), pixels)
    assert to_uint8(torch.tensor([[[[-3.0, 3.0]]]])).tolist() == [[[[0, 255]]]]


def test_a_side_that_does_not_fit_is_named(vae):
    with pytest.raises(ValueError, match="wanted multiples of 8, got 20 and 16"):
        VaeCodec(vae).latent_shape(20, 16)
