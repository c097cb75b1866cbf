"""Sampling: analytic trajectories, guidance, saving and loading, refusals."""

import copy

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sr_model import STRATEGIES, SemanticRoutingPipeline
from sr_model.fusion import FUSIONS
from sr_model.sample import main as sample_main


@pytest.fixture
def pipeline(tiny_dit, llm, tokenizer):
    def make(strategy="s2", shift=3.0):
        pipe = SemanticRoutingPipeline(
            tiny_dit(strategy), FlowMatchEulerDiscreteScheduler(shift=shift), llm, tokenizer, default_size=8
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def test_a_constant_velocity_is_integrated_exactly(pipeline):
    pipe = pipeline()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.zero_()
        pipe.transformer.proj_out.bias.fill_(0.25)
    start = torch.randn(1, 3, 8, 8)
    for steps in (1, 7):
        out = pipe("red", latents=start, num_inference_steps=steps, output_type="latent").images
        assert torch.allclose(out, start + 0.25, atol=1e-5)  # dx/dt = 0.25 from t = 0 to t = 1


def test_a_straight_path_ends_at_the_data(pipeline):
    """The exact velocity of the path to one known picture, (data - x) / (1 - t), lands on it."""
    pipe, data, seen = pipeline(), torch.rand(1, 3, 8, 8), []

    def exact(x, t, text, gate_time=None):
        seen.append(t.item())
        return (data - x) / (1 - t)

    pipe.transformer.forward = exact
    out = pipe("red", num_inference_steps=10, guidance_scale=1.0, output_type="latent").images
    assert torch.allclose(out, data, atol=1e-4)
    assert seen[0] == pytest.approx(0.0)
    assert seen == sorted(seen)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_guidance_is_the_combination_of_two_runs(pipeline, strategy):
    pipe, start = pipeline(strategy), torch.randn(2, 3, 8, 8)
    prompts, common = ["a red circle", "two"], {"num_inference_steps": 1, "latents": start, "output_type": "latent"}
    alone = pipe(prompts, guidance_scale=1.0, **common).images - start
    empty = pipe(["", ""], guidance_scale=1.0, **common).images - start
    guided = pipe(prompts, guidance_scale=4.0, **common).images - start
    assert torch.allclose(guided, empty + 4 * (alone - empty), atol=1e-4)


def test_own_generators_make_a_picture_independent_of_its_batch(pipeline):
    pipe = pipeline("s3")
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    three = pipe(["red", "two", "a blue"], generator=seeds, num_inference_steps=2, output_type="np").images
    one = pipe("two", generator=torch.Generator().manual_seed(1), num_inference_steps=2, output_type="np").images
    assert np.abs(three[1] - one[0]).max() <= 1 / 255


def test_output_types_callback_and_several_images(pipeline):
    pipe, steps = pipeline(), []

    def note(pipe, i, timestep, tensors):
        steps.append(i)
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 2 else {}

    out = pipe(["red", "two"], num_images_per_prompt=2, num_inference_steps=3, callback_on_step_end=note)
    assert steps == [0, 1, 2]
    assert [image.size for image in out.images] == [(8, 8)] * 4
    assert {image.getpixel((3, 3)) for image in out.images} == {(128, 128, 128)}  # zeros are mid-grey
    assert pipe("red", num_inference_steps=1, output_type="pt", return_dict=False)[0].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("strategy", ["s3", "fusedit"])
def test_saved_and_loaded_it_draws_the_same(pipeline, tmp_path, capsys, strategy):
    pipe = pipeline(strategy)
    pipe.save_pretrained(tmp_path / "pipe")
    again = SemanticRoutingPipeline.from_pretrained(tmp_path / "pipe")
    assert again.vae is None
    assert again.config.default_size == 8
    assert again.scheduler.config.shift == 3.0
    assert again.transformer.config.strategy == strategy
    again.set_progress_bar_config(disable=True)
    pictures = [
        np.asarray(p("a red circle", generator=torch.Generator().manual_seed(5), num_inference_steps=3).images[0])
        for p in (pipe, again)
    ]
    assert np.array_equal(*pictures)

    arguments = [str(tmp_path / "pipe"), "a red circle", "--seed", "5", "--steps", "3", "--out", str(tmp_path / "out")]
    assert sample_main(arguments) == 0
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "0000.png")), pictures[0])
    with pytest.raises(SystemExit) as stop:
        sample_main([str(tmp_path), "red"])
    assert stop.value.code == 2
    assert "wanted a folder with a model_index.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt: wanted at least one"),
        ({"height": 9}, "height, width: wanted multiples of 2, got 9 and 8"),
        ({"output_type": "jpeg"}, "output_type: wanted pil, np, pt or latent"),
        ({"num_inference_steps": 0}, "num_inference_steps: wanted at least 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: wanted at least 1"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: wanted 1 or 1 prompts, got 2"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, r"latents: wanted shape \[1, 3, 8, 8\]"),
        ({"generator": [torch.Generator()] * 2}, "generator: wanted one or 1 generators, got 2"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, r"wanted \['latents'\], got \{'x'\}"),
    ],
)
def test_bad_arguments_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(**{"prompt": "red", **arguments})


@pytest.mark.parametrize("strategy", FUSIONS)
def test_kept_keys_and_values_draw_what_fresh_ones_draw(pipeline, strategy):
    """In fp64, a prompt asked for twice and a shared negative one: each is projected once, or once a step."""
    pipe = pipeline(strategy)
    pipe.transformer = torch.nn.Module.to(pipe.transformer, torch.float64)
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder).double()
    pictures, calls, condition = {}, [], pipe.transformer.condition

    def spy(text, gate_time, times=1):
        calls.append(text.batch)
        return condition(text, gate_time, times)

    pipe.transformer.condition = spy
    for keep, fold in ((True, None), (False, False), (False, True)):
        pipe.cache_text_kv, pipe.transformer.conditioner.fold = keep, fold
        calls.clear()
        pictures[keep, fold] = pipe(
            ["red", "two", "red"],
            num_inference_steps=4,
            num_images_per_prompt=2,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        kept = keep and strategy in ("b1", "b2", "b3", "s2")
        assert calls == [3] * (1 if kept else 4)  # the empty prompt, "red" and "two"
    first, *others = pictures.values()
    for other in others:
        assert (other - first).norm() <= 1e-6 * first.norm()  # the sampler keeps x in fp32


def test_joint_buffers_hold_the_text_over_all_steps(pipeline):
    pipe = pipeline("fusedit")
    arguments = {"num_inference_steps": 4, "latents": torch.randn(2, 3, 8, 8), "output_type": "latent"}
    kept = pipe(["red", "two"], **arguments).images
    forward = pipe.transformer.forward

    def fresh(x, t, text, gate_time=None):
        text.joint.clear()
        return forward(x, t, text)

    pipe.transformer.forward = fresh
    assert torch.equal(pipe(["red", "two"], **arguments).images, kept)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strategy", ["s2", "s3", "fusedit"])
def test_a_replayed_graph_draws_what_the_eager_step_draws(pipeline, strategy):
    pipe, pictures = pipeline(strategy), []
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)  # the other tests' stays on the CPU
    pipe.to("cuda", torch.bfloat16)
    for pipe.cuda_graphs in (False, True):
        out = pipe(["red", "two"], num_inference_steps=5, latents=torch.ones(2, 3, 8, 8), output_type="latent")
        pictures.append(out.images)
    assert torch.equal(*pictures)  # the same kernels
