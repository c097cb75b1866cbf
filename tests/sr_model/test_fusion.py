"""Fusion weights: convex, uniform at zero logits, and the gates against Appendix A written out."""

import math

import pytest
import torch

from sr_model import STRATEGIES, TextFeatures, build
from sr_model.fusion import FUSIONS, build_fusion, centre_and_dispersion, time_embedding
from tests.conftest import TINY, randomize
from train.config import Strategy

LEARNABLE = ("b3", "s1", "s2", "s3")


def test_time_embedding_is_64_cosines_then_64_sines():
    t = 0.37
    row = time_embedding(torch.tensor([t]))[0]
    for i in (0, 1, 31, 63):
        angle = t * 10000 ** (-i / 64)
        assert row[i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert row[64 + i].item() == pytest.approx(math.sin(angle), abs=1e-6)


@pytest.mark.parametrize("strategy", FUSIONS)
def test_weights_are_convex_and_have_the_strategys_shape(strategy):
    fusion = randomize(build_fusion(strategy, 3, 5))
    alpha = fusion(torch.tensor([0.1, 0.9]), 5)
    assert alpha.shape == (2 if strategy in ("s1", "s3") else 1, 3 if strategy in ("s2", "s3") else 1, 5)
    assert alpha.min() >= 0
    assert torch.allclose(alpha.sum(-1), torch.ones(alpha.shape[:-1]))


def test_b1_takes_the_penultimate_layer_and_b2_the_average():
    t = torch.zeros(1)
    assert build_fusion("b1", 3, None)(t, 5).tolist() == [[[0, 0, 0, 1, 0]]]
    assert torch.equal(build_fusion("b2", 3, None)(t, 5), torch.full((1, 1, 5), 0.2))


def test_each_block_of_s3_has_the_gate_of_equation_7():
    fusion = randomize(build_fusion("s3", 2, 5)).double()
    t = torch.tensor([0.3], dtype=torch.float64)
    for d in range(2):
        first = torch.nn.functional.linear(time_embedding(t).double(), fusion.in_weight[d], fusion.in_bias[d])
        z = torch.nn.functional.linear(torch.nn.functional.silu(first), fusion.out_weight[d], fusion.out_bias[d])
        assert torch.allclose(fusion(t, 5)[:, d].double(), z.softmax(-1), atol=1e-5)


@pytest.mark.parametrize("strategy", LEARNABLE)
def test_with_zero_logits_every_learnable_strategy_computes_what_b2_computes(strategy):
    b2 = randomize(build("b2", "demo", **TINY))
    model = build(strategy, "demo", **TINY)
    own = {k: v for k, v in model.state_dict().items() if k.startswith("fusion.")}
    model.load_state_dict({**b2.state_dict(), **own})
    text = TextFeatures.from_padded(torch.randn(4, 2, 5, 24), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.8])
    expected = b2(x, t, text)
    assert (model(x, t, text) - expected).norm() <= 1e-6 * expected.norm()


def test_unknown_strategy_and_missing_layers_are_named():
    with pytest.raises(ValueError, match=r"strategy: wanted one of b1, .*, got 's9'"):
        build_fusion("s9", 2, 5)
    with pytest.raises(ValueError, match="text_layers: wanted the number"):
        build_fusion("s2", 2, None)


def test_the_training_flag_offers_the_models_strategies():
    assert Strategy.__args__ == STRATEGIES


def test_centre_and_dispersion_of_known_weights():
    uniform = torch.full((2, 36), 1 / 36)
    centre, dispersion = centre_and_dispersion(uniform)
    assert centre.tolist() == pytest.approx([0.5, 0.5])
    assert dispersion.tolist() == pytest.approx([37 / 420] * 2)
    ends = torch.zeros(36)
    ends[[0, -1]] = 3.0  # not normalised: eq. 14 does it
    centre, dispersion = centre_and_dispersion(ends)
    assert (centre.item(), dispersion.item()) == pytest.approx((0.5, 0.25))
    one = torch.nn.functional.one_hot(torch.tensor(7), 36).float()
    centre, dispersion = centre_and_dispersion(one)
    assert (centre.item(), dispersion.item()) == pytest.approx((7 / 35, 0.0))
