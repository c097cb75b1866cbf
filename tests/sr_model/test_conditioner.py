"""The context embedder folded into the K/V projections: the same keys, values and gradients, and when it is done."""

import pytest
import torch

from sr_model import TextFeatures, build
from sr_model.fusion import layers_read

LAYERS, WIDTH = 4, 24


def features(lengths=(3, 5, 1), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return TextFeatures.pack(torch.randn(LAYERS, sum(lengths), WIDTH, generator=g).to(dtype), list(lengths))


def trained(tiny_dit, strategy, dtype=torch.float64):
    """A model none of whose parameters is at its first, special value."""
    model = tiny_dit(strategy)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return torch.nn.Module.to(model, dtype)


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
@pytest.mark.parametrize("strategy", ["b1", "b2", "b3", "s1", "s2", "s3"])
def test_folded_equals_unfolded_with_all_gradients(tiny_dit, strategy, checkpointing):
    x, t, text = torch.randn(3, 3, 8, 8).double(), torch.tensor([0.2, 0.7, 0.9]), features()
    results = []
    for fold in (False, True):
        model = trained(tiny_dit, strategy).train()
        model.conditioner.fold = fold
        model.enable_gradient_checkpointing(checkpointing)
        out = model(x, t, text)
        out.square().mean().backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters()}))
    (plain, gradients), (folded, folded_gradients) = results
    assert not torch.equal(plain, folded)  # it did take another way
    assert (folded - plain).norm() <= 1e-10 * plain.norm()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert (folded_gradients[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


@pytest.mark.parametrize("strategy", ["b2", "s3"])
def test_in_bf16_folding_is_no_further_from_fp64(strategy):
    """At a width where rounding averages out; 2% for what is left of chance."""
    torch.manual_seed(0)
    sizes = {"depth": 4, "text_dim": 256, "text_layers": 8}
    model = build(strategy, "demo", **sizes)
    hidden = torch.randn(8, 300, 256)
    low = hidden.bfloat16()
    model = torch.nn.Module.to(model, torch.bfloat16)
    exact = torch.nn.Module.to(build(strategy, "demo", **sizes), torch.float64)
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    t = torch.tensor([0.4])
    with torch.no_grad():
        want = exact.condition(TextFeatures.pack(low.double(), [300]), t)
        errors = {}
        for fold in (False, True):
            model.conditioner.fold = fold
            got = model.condition(TextFeatures.pack(low, [300]), t)
            errors[fold] = [((a.double() - b).norm() / b.norm()).item() for a, b in ((got.k, want.k), (got.v, want.v))]
    assert all(folded <= 1.02 * plain for folded, plain in zip(errors[True], errors[False], strict=True)), errors


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["s1", "s3"])
def test_weights_folded_beforehand_serve_every_time(tiny_dit, strategy):
    model, text = trained(tiny_dit, strategy), features()
    assert model.folded(text, 1) is None  # 9 tokens
    folded = model.folded(text, 10**6)
    for time in (0.3, 0.8):
        plain, kept = (model.condition(text, torch.tensor([time]), pair) for pair in (None, folded))
        assert not torch.equal(plain.v, kept.v)  # it did take another way
        for a, b in ((plain.k, kept.k), (plain.v, kept.v)):
            assert (a - b).norm() <= 1e-10 * a.norm()


def test_the_rule_takes_the_cheaper_way():
    """Multiply-adds counted here by hand: the embedder's products against the fold's."""
    conditioner = build("s3", "paper", device="meta").conditioner
    width, depth, kv = 2560, 24, 2048
    for tokens, rows, times in ((1, 1, 1), (2048, 24, 1), (2049, 24, 1), (49_152, 1, 1), (49_153, 1, 1), (128, 24, 50)):
        embedder, fold = times * tokens * rows * width * width, depth * kv * width * width
        assert conditioner.folds(tokens, rows, times) == (fold < embedder)
    assert not conditioner.folds(2048, 24)
    assert conditioner.folds(2049, 24)
    conditioner.fold = False
    assert not conditioner.folds(10**6, 24)


def test_one_layer_is_all_that_b1_reads():
    assert layers_read("b1", 36) == (35,)
