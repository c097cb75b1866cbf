"""The plain path computes what ours computes."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from bench import plain
from sr_model import SemanticRoutingPipeline


@pytest.mark.parametrize("strategy", ["b1", "b2", "b3", "s1", "s2", "s3"])
def test_padded_unfolded_and_uncached_gives_the_same_pictures(tiny_dit, llm, tokenizer, strategy):
    dit = torch.nn.Module.to(tiny_dit(strategy), torch.float64)
    pipe = SemanticRoutingPipeline(
        dit, FlowMatchEulerDiscreteScheduler(shift=3.0), copy.deepcopy(llm).double(), tokenizer, default_size=8
    )
    pipe.set_progress_bar_config(disable=True)
    prompts, start = ["a red circle", "two"], torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = pipe(prompts, latents=start, num_inference_steps=3, guidance_scale=4.0, output_type="latent").images
    theirs = plain.sample(pipe, prompts, start, 3, 4.0, length=6)
    assert (ours - theirs).norm() <= 1e-6 * ours.norm()
