"""Per-sample draws: they depend on seed, step and index alone, and have the right distribution."""

import numpy as np
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
        assert base.choice != other.choice
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


def test_captions_are_chosen_by_weight_and_alone():
    n = 4000
    many = draw(3, 5, range(n), (1, 1, 1))
    columns = [(f"a{i}", f"b{i}", f"c{i}") for i in range(n)]
    chosen = many.captions(columns, (1.0, 0.0, 3.0))
    assert all(text[1:] == str(i) for i, text in enumerate(chosen))
    share = sum(text[0] == "a" for text in chosen) / n
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5
    assert not any(text[0] == "b" for text in chosen)
    assert many.captions([("only",)] * n, (0.3,)) == ["only"] * n
    # The other draws say nothing about it.
    for other in (many.uniform, many.normal, many.noise.flatten()):
        assert abs(np.corrcoef(many.choice, other)[0, 1]) < 4 / n**0.5


def test_the_draws_of_a_sample_are_those_of_the_first_release():
    """Checkpoints of earlier runs resume bit-equal: what was drawn before captions could be chosen is drawn still."""
    generator = np.random.Generator(np.random.Philox(key=[7, (12 << 32) | 3]))
    uniform, rest = generator.random(dtype=np.float32), generator.standard_normal(97, dtype=np.float32)
    got = draw(7, 12, [3], SHAPE, posterior=True)
    assert got.uniform.item() == uniform
    assert torch.equal(torch.cat([got.normal, got.noise.flatten(), got.posterior.flatten()]), torch.from_numpy(rest))
