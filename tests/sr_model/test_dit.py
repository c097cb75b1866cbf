"""The DiT: the paper's parameter counts, rotary embeddings, gradients, refusals."""

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sr_model import TextFeatures, build
from sr_model.build import parameter_count
from sr_model.layers import image_rope, qk_norm_rope, text_rope

PAPER = {
    "b1": 2_246_693_952,
    "b2": 2_246_693_952,
    "b3": 2_246_693_988,
    "s1": 2_246_778_468,
    "s2": 2_246_694_816,
    "s3": 2_248_722_336,
}


@pytest.mark.parametrize(("strategy", "parameters"), PAPER.items())
def test_parameters_of_the_paper_preset(strategy, parameters):
    assert parameter_count(build(strategy, "paper", device="meta")) == parameters


def features(lengths=(3, 5), layers=4, width=24, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return TextFeatures.pack(torch.randn(layers, sum(lengths), width, generator=g).to(dtype), list(lengths))


def test_a_fresh_model_predicts_zero():
    model = build("s3", "demo")
    text = features(layers=30, width=576)
    assert torch.equal(model(torch.randn(2, 3, 32, 32), torch.rand(2), text), torch.zeros(2, 3, 32, 32))


def test_image_rope_turns_first_pairs_by_row_and_next_by_column():
    rope = image_rope(3, 4, 16, 1e5, torch.device("cpu"))
    assert rope.shape == (2, 12, 8)
    for row in range(3):
        for column in range(4):
            for i in range(4):  # hd/4 frequencies, base^(-2i/(hd/2))
                frequency = 1e5 ** (-2 * i / 8)
                for place, angle in ((i, row * frequency), (4 + i, column * frequency)):
                    expected = [math.cos(angle), math.sin(angle)]
                    assert rope[:, row * 4 + column, place].tolist() == pytest.approx(expected, abs=1e-6)


def test_rotation_is_that_of_complex_numbers_after_an_rms_norm():
    x = torch.randn(6, 2, 8, dtype=torch.float64)
    weight = torch.rand(8, dtype=torch.float64)
    rope = text_rope(torch.arange(6), 8, 100.0)
    angles = torch.arange(6)[:, None] * 100.0 ** (-torch.arange(4) / 4)
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    pairs = torch.complex(y[..., :4], y[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat([pairs.real, pairs.imag], -1)
    assert torch.allclose(qk_norm_rope(x, weight, rope, 1e-6), expected, atol=1e-6)


def test_text_keys_are_rotated_by_their_place_in_their_own_prompt(tiny_dit):
    model = tiny_dit("b2")
    text = features((3, 5))
    together = model.condition(text, torch.zeros(1))
    apart = [model.condition(part, torch.zeros(1)) for part in text.split()]
    assert torch.allclose(together.k, torch.cat([kv.k for kv in apart], 1), atol=1e-6)
    model.conditioner.rope_base = None
    unrotated = model.condition(text, torch.zeros(1))
    first = [0, 3]  # rotation by 0 at every prompt's first token, by something elsewhere
    assert torch.allclose(together.k[:, first], unrotated.k[:, first], atol=1e-6)
    assert not torch.allclose(together.k[:, 1], unrotated.k[:, 1], atol=1e-2)


def test_b1_takes_the_one_state_it_asked_for(tiny_dit):
    """Where only the features tell the LLM's number of layers: all of them, or the penultimate one alone."""
    model, text = tiny_dit("b1", text_layers=None), features()
    alone = text.select(model.reads(4)["layer_ids"])
    assert alone.layer_ids == (3,)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.5])
    want = tiny_dit("b1")(x, t, text)
    assert torch.equal(model(x, t, text), want)
    assert torch.equal(model(x, t, alone), want)


@pytest.mark.parametrize("fold", [False, True])
def test_one_sample_trains_in_bf16_and_under_autocast(tiny_dit, fold):
    """Against fp32: bf16 keeps 8 bits."""
    x, t, text = torch.randn(1, 3, 8, 8), torch.tensor([0.5]), features((5,))
    outs = {}
    for way in ("fp32", "bf16", "autocast"):
        model = tiny_dit("s3").train()
        model.conditioner.fold = fold
        dtype = torch.bfloat16 if way == "bf16" else torch.float32
        model = torch.nn.Module.to(model, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            out = model(x.to(dtype), t, text)
        out.float().square().mean().backward()
        outs[way] = out.detach().float()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    for way in ("bf16", "autocast"):
        assert (outs[way] - outs["fp32"]).norm() <= 0.05 * outs["fp32"].norm(), way


@pytest.mark.parametrize("strategy", ["b1", "s1", "s3"])
def test_checkpointing_changes_no_gradient_and_every_parameter_has_one(tiny_dit, strategy):
    x, t, text = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7]), features()
    gradients = []
    for mode in ("none", "full", "selective"):
        model = tiny_dit(strategy).train()
        model.enable_gradient_checkpointing(mode)
        model(x, t, text).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name
        assert torch.equal(gradient, gradients[2][name]), name


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_blocks_compile_whole_and_give_the_same_gradients(tiny_dit, mode):
    """fullgraph: a graph break would raise. Prompts of other lengths take the same graphs."""
    plain, compiled = tiny_dit("s3").train(), tiny_dit("s3").train()
    torch._dynamo.reset()
    for model in (plain, compiled):
        model.enable_gradient_checkpointing(mode)
    compiled.compile_blocks()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7])
    for lengths in ((3, 5), (4, 9), (7, 2)):
        for model in (plain, compiled):
            model.zero_grad()
            model(x, t, features(lengths)).square().mean().backward()
        for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= 1e-5 * p.grad.norm(), name


def test_what_checkpointing_recomputes(tiny_dit):
    """Operations counted as they run: full redoes the products, selective only what lies between them."""

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.runs = Counter()

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.runs[op.overloadpacket.__name__] += 1
            return op(*args, **(kwargs or {}))

    runs = {}
    for mode in ("none", "selective", "full"):
        model = tiny_dit("s3").train()
        model.enable_gradient_checkpointing(mode)
        with Count() as counter:
            model(torch.randn(2, 3, 8, 8), torch.rand(2), features()).sum().backward()
        runs[mode] = counter.runs
    assert runs["selective"]["mm"] == runs["none"]["mm"]
    again = 2 * (9 - 1)  # blocks x projections; the last one's output is not needed
    assert runs["full"]["mm"] == runs["none"]["mm"] + again
    assert runs["none"]["silu"] < runs["selective"]["silu"] == runs["full"]["silu"]


def test_bf16_stays_near_fp32(tiny_dit):
    x, t, text = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7]), features()
    model = tiny_dit("s3")
    expected = model(x, t, text)
    low = torch.nn.Module.to(model, torch.bfloat16)
    got = low(x.bfloat16(), t, features(dtype=torch.bfloat16)).float()
    assert (got - expected).norm() <= 0.03 * expected.norm()


def test_the_gates_see_gate_time_in_place_of_t(tiny_dit):
    model, x, text = tiny_dit("s3"), torch.randn(2, 3, 8, 8), features()
    t, other = torch.tensor([0.2, 0.2]), torch.tensor([1.02, 1.02])
    assert torch.equal(model(x, t, text, gate_time=other), model(x, other, text))
    assert not torch.equal(model(x, t, text, gate_time=other), model(x, t, text))


def test_shared_time_equals_the_same_time_per_sample(tiny_dit):
    model, x, text = tiny_dit("s3"), torch.randn(2, 3, 8, 8), features()
    assert torch.allclose(model(x, torch.tensor([0.3]), text), model(x, torch.tensor([0.3, 0.3]), text), atol=1e-5)


def test_bad_arguments_are_named(tiny_dit):
    model, t = tiny_dit("s2"), torch.rand(2)
    with pytest.raises(ValueError, match=r"x: wanted \[B, 3, H, W\] with H and W multiples of 2"):
        model(torch.randn(2, 3, 9, 8), t, features())
    with pytest.raises(ValueError, match="text: wanted 3 prompts"):
        model(torch.randn(3, 3, 8, 8), torch.rand(3), features())
    with pytest.raises(ValueError, match=r"text: wanted hidden states \[4\]"):
        model(torch.randn(2, 3, 8, 8), t, features(layers=3))
    for change, message in (
        ({"num_heads": 3}, "num_heads: wanted a multiple"),
        ({"head_dim": 6}, "head_dim: wanted a multiple of 4"),
        ({"text_layers": 1}, "text_layers: wanted at least 2"),
        ({"gate_input": "x"}, "gate_input: wanted"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_dit("s2", **change)
    with pytest.raises(ValueError, match="preset: wanted one of paper, demo"):
        build("s2", "huge")
