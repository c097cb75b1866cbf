"""Which captions, pictures and evaluation prompts a corpus gets."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.shapes.captions import all_prompts
from train.shapes.corpus import (
    DEFAULT_MIX,
    BadArgument,
    ShapesArguments,
    choose_captions,
    choose_evaluation,
    choose_samples,
)
from train.shapes.scene import COLORS, HELD_OUT_COMBINATIONS, KINDS, SKILLS, SPLITS, split_of


def test_default_mix_is_whole_and_78_percent_single():
    assert set(DEFAULT_MIX) == set(SKILLS)
    assert sum(DEFAULT_MIX.values()) == pytest.approx(1)
    assert DEFAULT_MIX["attribute"] + DEFAULT_MIX["scene"] == pytest.approx(0.78)


def test_default_captions():
    captions = choose_captions(ShapesArguments())
    assert len({prompt.caption for prompt in captions}) == len(captions) == 600
    assert Counter(prompt.skill for prompt in captions) == {
        "attribute": 120,
        "scene": 120,
        "spatial": 66,
        "part": 66,
        "counting": 66,
        "comparison": 49,
        "differentiation": 49,
        "negation": 32,
        "universal": 32,
    }
    assert all(split_of(prompt) == SPLITS[0] for prompt in captions)


@pytest.mark.parametrize("skill", ["attribute", "scene"])
def test_default_captions_name_every_allowed_combination(skill):
    groups = [prompt.groups[0] for prompt in choose_captions(ShapesArguments()) if prompt.skill == skill]
    assert {(g.color, g.kind) for g in groups} == set(product(COLORS, KINDS)) - HELD_OUT_COMBINATIONS


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 1500), st.integers(0, 100), st.sets(st.sampled_from(SKILLS), min_size=1))
def test_any_number_of_captions_and_samples(wanted, seed, skills):
    available = sum(len(all_prompts(skill, SPLITS[0])) for skill in skills)
    number = min(wanted, available)
    arguments = ShapesArguments(samples=number + seed, captions=number, seed=seed, mix=dict.fromkeys(skills, 0.3))
    captions = choose_captions(arguments)
    assert len({prompt.caption for prompt in captions}) == len(captions) == number
    assert {prompt.skill for prompt in captions} <= skills
    rng = np.random.default_rng(seed)
    samples = choose_samples(captions, arguments.samples, arguments.mix, rng, each=True)
    assert len(samples) == arguments.samples
    assert set(samples) == set(captions)


def test_a_skill_with_too_few_captions_leaves_its_share():
    captions = choose_captions(ShapesArguments(captions=100, mix={"universal": 0.9, "spatial": 0.1}))
    assert Counter(prompt.skill for prompt in captions) == {"universal": 36, "spatial": 64}


def test_samples_follow_the_mix_and_spread_over_captions():
    arguments = ShapesArguments(samples=2000, captions=200)
    captions = choose_captions(arguments)
    samples = choose_samples(captions, 2000, arguments.mix, np.random.default_rng(0), each=True)
    skills = Counter(prompt.skill for prompt in samples)
    assert {skill: skills[skill] / 2000 for skill in SKILLS} == pytest.approx(DEFAULT_MIX)
    assert set(Counter(samples).values()) == {10}


def test_evaluation_prompts():
    arguments = ShapesArguments(prompts=5)
    captions = choose_captions(arguments)
    evaluation = choose_evaluation(arguments, captions)
    numbers = Counter((split, prompt.skill) for split, prompt in evaluation)
    held_out = {
        "held-out-combination": set(SKILLS) - {"universal"},
        "held-out-count": {"counting", "differentiation"},
        "held-out-relation": {"spatial"},
    }
    expected = {(SPLITS[0], skill): 5 for skill in SKILLS}
    expected |= {(split, skill): 5 for split, skills in held_out.items() for skill in skills}
    assert numbers == expected
    assert len({prompt.caption for _, prompt in evaluation}) == len(evaluation)
    for split, prompt in evaluation:
        assert split_of(prompt) == split
        assert (prompt in captions) == (split == SPLITS[0])


def test_the_seed_decides():
    assert choose_captions(ShapesArguments(seed=1)) == choose_captions(ShapesArguments(seed=1))
    assert choose_captions(ShapesArguments(seed=1)) != choose_captions(ShapesArguments(seed=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples: got 0, want a whole number of at least 1"),
        ({"samples": 10.5}, "samples: got 10.5, want a whole number of at least 1"),
        ({"captions": -1}, "captions: got -1, want a whole number of at least 1"),
        ({"captions": 601, "samples": 600}, "captions: got 601, want at most samples, which is 600"),
        ({"captions": 9000, "samples": 9000}, "captions: got 9000, want at most 8066: the mix's skills have no more"),
        ({"captions": 37, "mix": {"universal": 1.0}}, "captions: got 37, want at most 36: the mix's skills have no"),
        ({"size": 31}, "size: got 31, want a whole number of at least 32"),
        ({"seed": -1}, "seed: got -1, want a whole number of at least 0"),
        ({"val": 0}, "val: got 0, want a whole number of at least 1"),
        ({"prompts": 0}, "prompts: got 0, want a whole number of at least 1"),
        ({"mix": {"colour": 1.0}}, "mix: got the skill 'colour', want skills out of attribute, scene"),
        ({"mix": {"scene": -1.0}}, r"mix: got shares \[-1.0\], want numbers of at least 0 with a positive sum"),
        ({"mix": {"scene": float("nan")}}, r"mix: got shares \[nan\], want numbers of at least 0"),
        ({"mix": {}}, r"mix: got shares \[\], want numbers of at least 0 with a positive sum"),
        ({"compression": "rar"}, "compression: got 'rar', want none or zstd"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(BadArgument, match=f"^{message}"):
        ShapesArguments(**arguments)
