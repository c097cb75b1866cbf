"""Per-sample draws: they depend on seed, step and index alone, and have the right distribution."""

import torch

from train.draws import draw

SHAPE = (3, 4, 4)


def test_a_sample_draws_the_same_in_any_split_of_the_batch():
    whole = draw(7, 12, range(6), SHAPE, posterior=True)
    for parts in ((range(3), range(3, 6)), (range(1), range(1, 6))):
        joined = [
            torch.cat(pair)
            for pair in zip(*(vars(draw(7, 12, p, SHAPE, posterior=True)).values() for p in parts), strict=True)
        ]
        assert all(torch.equal(a, b) for a, b in zip(vars(whole).values(), joined, strict=True))


def test_seed_step_and_index_all_change_the_draws():
    base = draw(7, 12, [3], SHAPE, posterior=True)
    for place in ((8, 12, [3]), (7, 13, [3]), (7, 12, [4])):
        other = draw(*place, SHAPE, posterior=True)
        assert not torch.equal(base.noise, other.noise)
        assert not torch.equal(base.posterior, other.posterior)
        assert base.normal != other.normal
    assert not torch.equal(base.noise, base.posterior)
    bare = draw(7, 12, [3], SHAPE)
    assert bare.posterior is None
    assert torch.equal(bare.noise, base.noise)
    assert torch.equal(bare.normal, base.normal)


def test_moments_and_drop_rate():
    many = draw(0, 0, range(4000), SHAPE, posterior=True)
    for values in (many.noise, many.posterior, many.normal):
        assert abs(values.mean().item()) < 4 / values.numel() ** 0.5
        assert abs(values.var().item() - 1) < 6 / values.numel() ** 0.5
    assert 0.08 < sum(many.dropped(0.1)) / 4000 < 0.12
    assert not any(many.dropped(0.0))
    assert all(many.dropped(1.0))
