"""Sampling: analytic trajectories, guidance, saving and loading, refusals."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from sr_model import STRATEGIES, SemanticRoutingPipeline, TextFeatures
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
        ({"prompt": []}, r"prompt: wanted a string or a list of at least one, got \[\]"),
        ({"prompt": None}, "prompt: wanted a string or a list of at least one, got None"),
        ({"height": 9}, "height, width: wanted multiples of 2, got 9 and 8"),
        ({"height": -8}, "height, width: wanted multiples of 2, got -8 and 8"),
        ({"width": 0}, "height, width: wanted multiples of 2, got 8 and 0"),
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

    def spy(text, gate_time, folded=None):
        calls.append(text.batch)
        return condition(text, gate_time, folded)

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


def test_what_follows_the_parts_of_the_pipeline(pipeline, tiny_dit):
    """Weights that an optimiser changes without a trace, another transformer, dtype or LLM: nothing kept is stale."""
    arguments = {"num_inference_steps": 3, "latents": torch.randn(1, 3, 8, 8), "output_type": "latent"}
    pipe = pipeline("s3")
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)  # the other tests' stays as it is
    pipe.transformer.conditioner.fold = True
    before = pipe("red", **arguments).images
    for change in ("optimiser", "data", "transformer", "layers", "dtype", "llm"):
        if change == "optimiser":
            optimizer = torch.optim.AdamW(pipe.transformer.parameters(), lr=0.05, fused=True)
            for parameter in pipe.transformer.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        elif change == "data":
            pipe.transformer.conditioner.embed.weight.data.copy_(pipe.transformer.conditioner.embed.weight.data * 2)
        elif change == "transformer":
            pipe.transformer = tiny_dit("b1")
        elif change == "layers":
            pipe.transformer = tiny_dit("fusedit", first_layer=0)
            pipe("red", **arguments)
            pipe.transformer = tiny_dit("fusedit", first_layer=2)
        elif change == "dtype":
            pipe.to(torch.bfloat16)
        else:
            pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
            with torch.no_grad():
                pipe.text_encoder.embed_tokens.weight.mul_(-1)
        after = pipe("red", **arguments).images
        fresh = SemanticRoutingPipeline(
            copy.deepcopy(pipe.transformer), pipe.scheduler, copy.deepcopy(pipe.text_encoder), pipe.tokenizer,
            default_size=8,
        )  # fmt: skip
        assert torch.equal(after, fresh("red", **arguments).images), change
        assert not torch.allclose(after, before, rtol=1e-3), change
        before = after


def test_prompts_are_kept_between_calls_whatever_wraps_the_llm(pipeline):
    pipe = pipeline("s2")
    head = LlamaForCausalLM(pipe.text_encoder.config).eval()
    head.model = pipe.text_encoder
    pipe.text_encoder = head
    for _ in range(3):
        pipe("red", num_inference_steps=1)
    assert pipe._encoder.encoded == 2  # "red" and the empty one
    ids = torch.tensor([[3, 4, 5]])
    assert torch.isfinite(head(input_ids=ids).logits).all()  # still the user's own model
    assert head.config._attn_implementation != "sr_varlen"


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_no_guidance_is_the_prompt_alone(pipeline, scale):
    pipe, start = pipeline(), torch.randn(1, 3, 8, 8)
    common = {"num_inference_steps": 2, "latents": start, "output_type": "latent"}
    assert torch.equal(pipe("red", guidance_scale=scale, **common).images, pipe("red", guidance_scale=1.0, **common)[0])


def test_a_callback_may_end_the_run(pipeline):
    pipe, seen = pipeline(), []

    def stop(pipe, i, timestep, tensors):
        seen.append((i, pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance))
        pipe._interrupt = i == 1
        return {}

    pipe("red", num_inference_steps=4, guidance_scale=3.0, callback_on_step_end=stop)
    assert seen == [(0, 4, 3.0, True), (1, 4, 3.0, True)]
    assert len(pipe("red", num_inference_steps=2).images) == 1  # the next one runs


class NothingSent(TorchDispatchMode):
    """Fails on what a captured CUDA graph cannot hold: copies from or to the CPU, and reads of values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        sent = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.index.Tensor, torch.ops.aten.nonzero.default}
        assert function not in sent, function
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            assert not isinstance(value, torch.Tensor) or value.device.type == "meta" or value.ndim == 0, function
        return out


@torch.no_grad()
@pytest.mark.parametrize("strategy", FUSIONS)
@pytest.mark.parametrize("cached", [False, True])
def test_a_sampling_step_sends_nothing_to_the_device(pipeline, strategy, cached, monkeypatch):
    monkeypatch.setattr("sr_model.layers.varlen_attention", lambda q, *_: torch.empty_like(q))  # a GPU's own kernel
    pipe = pipeline(strategy)
    text = pipe.encode_prompt(["red", "a blue circle"])
    there = TextFeatures(text.hidden.to("meta"), text.layer_ids, text.cu_seqlens.to("meta"), text.cu_seqlens_host,
                         text.mean.to("meta"), text.rstd.to("meta"))  # fmt: skip
    pipe.transformer.to("meta")
    pipe.cache_text_kv, pipe.encode_prompt = cached, lambda prompts: there
    for fold in (False, True):
        pipe.transformer.conditioner.fold = fold
        velocity = pipe._velocity(["red", "red", "a blue circle"], 50)
        x, t = torch.randn(3, 3, 8, 8, device="meta"), torch.zeros(1, device="meta")
        with NothingSent():
            assert velocity(x, t).shape == x.shape


@torch.no_grad()
@pytest.mark.parametrize("method", ["folded", "condition", "encode"])
def test_a_model_that_waits_on_the_cpu_comes_when_it_is_asked(pipeline, method):
    """As `enable_model_cpu_offload` hooks it; "meta" stands for the GPU."""
    pipe = pipeline("s3")
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    text = pipe.encode_prompt(["red"])
    for model in (pipe.text_encoder, pipe.transformer):
        cpu_offload_with_hook(model, "meta")
    model = pipe.text_encoder if method == "encode" else pipe.transformer
    assert pipe._execution_device.type == "meta"
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # the text stays where it is
        if method == "folded":
            model.folded(text, 10**6)
        elif method == "condition":
            model.condition(text, torch.zeros(1))
        else:
            pipe.encode_prompt(["two"])
    assert {p.device.type for p in model.parameters()} == {"meta"}


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
