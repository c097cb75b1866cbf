"""Flow matching against its closed forms."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sr_model import flow


def test_ends_and_velocity_of_the_path():
    data, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert torch.equal(flow.interpolate(data, noise, torch.zeros(3)), noise)
    assert torch.equal(flow.interpolate(data, noise, torch.ones(3)), data)
    t, h = torch.tensor([0.2, 0.5, 0.7]), 0.25
    slope = (flow.interpolate(data, noise, t + h) - flow.interpolate(data, noise, t)) / h
    assert torch.allclose(slope, flow.velocity(data, noise), atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_training_times_have_the_quantiles_of_a_shifted_logit_normal(shift):
    n = torch.distributions.Normal(0.0, 1.0)
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    sigma = torch.sigmoid(n.icdf(quantiles.float()).double())
    expected = shift * sigma / (1 + (shift - 1) * sigma)  # monotone, so quantiles map to quantiles
    drawn = 1 - flow.logit_normal_times(torch.randn(200_000, generator=torch.Generator().manual_seed(0)), shift)
    assert torch.allclose(drawn.double().quantile(quantiles), expected, atol=5e-3)


def test_the_shift_is_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert torch.allclose(flow.shift_sigma(plain.sigmas, 3.0), scheduler.sigmas, atol=1e-6)
