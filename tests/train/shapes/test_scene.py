"""The vocabulary, what prompts mean, and the scenes drawn for them."""

from __future__ import annotations

import json
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.shapes.captions import all_prompts
from train.shapes.layout import sample_scene
from train.shapes.scene import (
    COLORS,
    DEFAULT_GROUND,
    DOTS,
    HELD_OUT_COMBINATIONS,
    HELD_OUT_COUNTS,
    HELD_OUT_RELATIONS,
    KINDS,
    NAMED_GROUNDS,
    RGB,
    SKILLS,
    SPLITS,
    Group,
    Prompt,
    Scene,
    Shape,
    holds,
    is_held_out,
)

TRAIN = SPLITS[0]
EVERY = [prompt for skill in SKILLS for split in SPLITS for prompt in all_prompts(skill, split)]


def by_caption(caption: str) -> Prompt:
    (prompt,) = [prompt for prompt in EVERY if prompt.caption == caption]
    return prompt


def shape(words: str, x: float = 0.5, y: float = 0.5, size: float = 0.35, dot: str | None = None) -> Shape:
    color, kind = words.split()
    return Shape(kind, color, x, y, size, dot)


def test_an_edge_passes_no_third_shape_colour():
    surroundings = (DEFAULT_GROUND, *NAMED_GROUNDS, *DOTS)
    mixes = np.linspace(0, 1, 201)[:, None]
    for color, other in product(COLORS, surroundings):
        edge = np.array(RGB[color]) * (1 - mixes) + np.array(RGB[other]) * mixes
        for third in set(COLORS) - {color, other}:
            assert np.linalg.norm(edge - np.array(RGB[third]), axis=1).min() > 60, (color, other, third)


def test_palette_colours_are_far_apart():
    for a, b in combinations(RGB, 2):
        assert np.linalg.norm(np.subtract(RGB[a], RGB[b])) > 90, (a, b)


def test_captions_are_distinct_short_lower_case():
    captions = [prompt.caption for prompt in EVERY]
    assert len(set(captions)) == len(captions)
    assert all(caption == caption.lower() and len(caption.split()) < 20 for caption in captions)
    assert not any(DEFAULT_GROUND in caption for caption in captions)


@pytest.mark.parametrize(
    ("skill", "numbers"),
    [
        ("attribute", [120, 20, 0, 0]),
        ("scene", [120, 20, 0, 0]),
        ("spatial", [4712, 1672, 0, 248]),
        ("part", [120, 20, 0, 0]),
        ("counting", [204, 34, 36, 0]),
        ("comparison", [1900, 660, 0, 0]),
        ("differentiation", [640, 256, 160, 0]),
        ("negation", [214, 20, 0, 0]),
        ("universal", [36, 0, 0, 0]),
    ],
)
def test_number_of_prompts(skill, numbers):
    assert [len(all_prompts(skill, split)) for split in SPLITS] == numbers


def test_every_allowed_combination_is_a_training_attribute_and_scene():
    for skill in ("attribute", "scene"):
        seen = {(p.groups[0].color, p.groups[0].kind) for p in all_prompts(skill, TRAIN)}
        assert seen == set(product(COLORS, KINDS)) - HELD_OUT_COMBINATIONS


def test_held_out_relations_are_closed_under_the_inverse():
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert {(b, inverse[relation], a) for a, relation, b in HELD_OUT_RELATIONS} == HELD_OUT_RELATIONS


@pytest.mark.parametrize("skill", SKILLS)
def test_scenes_satisfy_their_prompt_fit_in_and_do_not_touch(skill):
    rng = np.random.default_rng(3)
    for split in SPLITS:
        prompts = all_prompts(skill, split)
        for i in rng.permutation(len(prompts))[:60]:
            scene = sample_scene(prompts[i], rng)
            assert holds(scene.prompt, scene.shapes, scene.ground)
            assert (split == TRAIN) == (not is_held_out(scene.shapes))
            for s in scene.shapes:
                assert min(s.x, s.y) - s.size / 2 > 0.02
                assert max(s.x, s.y) + s.size / 2 < 0.98
            for a, b in combinations(scene.shapes, 2):
                gap = max(abs(a.x - b.x), abs(a.y - b.y)) - (a.size + b.size) / 2
                assert gap * 32 >= 2


@pytest.mark.parametrize("skill", SKILLS)
def test_training_scenes_show_nothing_held_out(skill):
    rng = np.random.default_rng(4)
    for prompt in all_prompts(skill, TRAIN)[::7]:
        shapes = sample_scene(prompt, rng).shapes
        kinds = [s.kind for s in shapes]
        assert not HELD_OUT_COMBINATIONS & {(s.color, s.kind) for s in shapes}
        assert not HELD_OUT_COUNTS & {(kinds.count(kind), kind) for kind in kinds}
        if len(shapes) == 2:
            for a, b in (shapes, shapes[::-1]):
                across = abs(a.x - b.x) - abs(a.y - b.y)
                assert not (a.kind == "circle" and b.kind == "square" and b.x > a.x and across > 0)
                assert not (a.kind == "triangle" and b.kind == "cross" and b.y > a.y and across < 0)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(EVERY), st.integers(0, 2**32 - 1))
def test_scene_survives_json(prompt, seed):
    scene = sample_scene(prompt, np.random.default_rng(seed))
    assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
    assert sample_scene(prompt, np.random.default_rng(seed)) == scene


def test_a_prompt_that_cannot_be_satisfied_is_refused():
    with pytest.raises(ValueError, match="no scene satisfies 'x'"):
        sample_scene(Prompt("negation", "x", (Group(1, "circle", "red"),), absent="red"), np.random.default_rng(0))


LEFT, RIGHT = {"x": 0.26}, {"x": 0.74}


@pytest.mark.parametrize(
    ("caption", "shapes", "ground", "expected"),
    [
        ("a red circle", [shape("red circle")], "grey", True),
        ("a red circle", [shape("red circle")], "blue", True),
        ("a red circle", [shape("red square")], "grey", False),
        ("a red circle", [shape("blue circle")], "grey", False),
        ("a red circle", [shape("red circle", **LEFT), shape("red circle", **RIGHT)], "grey", False),
        ("a red circle", [shape("red circle", dot="white")], "grey", False),
        ("a red circle", [], "grey", False),
        ("a red circle on a white background", [shape("red circle")], "white", True),
        ("a red circle on a white background", [shape("red circle")], "grey", False),
        ("a red circle above a blue square", [shape("red circle", y=0.3), shape("blue square", y=0.7)], "grey", True),
        ("a red circle above a blue square", [shape("blue square", y=0.7), shape("red circle", y=0.3)], "grey", True),
        ("a red circle above a blue square", [shape("red circle", y=0.7), shape("blue square", y=0.3)], "grey", False),
        (
            "a red circle above a blue square",
            [shape("red circle", 0.1, 0.3), shape("blue square", 0.9, 0.7)],
            "",
            False,
        ),
        ("a red circle with a white dot", [shape("red circle", dot="white")], "grey", True),
        ("a red circle with a white dot", [shape("red circle", dot="black")], "grey", False),
        ("a red circle with a white dot", [shape("red circle")], "grey", False),
        ("two red circles", [shape("red circle")] * 2, "grey", True),
        ("two red circles", [shape("red circle")] * 3, "grey", False),
        ("two red circles", [shape("red circle"), shape("blue circle")], "grey", False),
        (
            "a large red circle and a small blue square",
            [shape("red circle", size=0.5), shape("blue square", size=0.3)],
            "grey",
            True,
        ),
        (
            "a large red circle and a small blue square",
            [shape("red circle", size=0.3), shape("blue square", size=0.5)],
            "grey",
            False,
        ),
        ("a large red circle and a small blue square", [shape("red circle"), shape("blue square")], "grey", False),
        ("more circles than squares", [shape("red circle")] * 2 + [shape("blue square")], "grey", True),
        ("more circles than squares", [shape("red circle")] + [shape("blue square")] * 2, "grey", False),
        ("more circles than squares", [shape("red circle"), shape("blue square")], "grey", False),
        ("more circles than squares", [shape("red circle")] * 2, "grey", False),
        (
            "four squares, one is red and the others are blue",
            [shape("blue square")] * 3 + [shape("red square")],
            "grey",
            True,
        ),
        (
            "four squares, one is red and the others are blue",
            [shape("blue square")] + [shape("red square")] * 3,
            "grey",
            False,
        ),
        ("a square that is not red", [shape("blue square")], "grey", True),
        ("a square that is not red", [shape("red square")], "grey", False),
        ("a square that is not red", [], "grey", False),
        ("two shapes, no circles", [shape("red square"), shape("blue cross")], "grey", True),
        ("two shapes, no circles", [shape("red square"), shape("blue circle")], "grey", False),
        ("two shapes, no circles", [shape("red square")], "grey", False),
        ("two shapes, no circles", [shape("red square"), Shape(None, "blue", 0.5, 0.5, 0.3)], "grey", False),
        (
            "a red square next to a shape that is not a circle",
            [shape("red square"), shape("blue cross")],
            "grey",
            True,
        ),
        (
            "a red square next to a shape that is not a circle",
            [shape("red square"), shape("blue circle")],
            "grey",
            False,
        ),
        ("a red square next to a shape that is not a circle", [shape("red square")], "grey", False),
        ("all shapes are red", [shape("red square"), shape("red cross")], "grey", True),
        ("all shapes are red", [shape("red square"), shape("red cross"), shape("blue cross")], "grey", False),
        ("all shapes are red", [shape("red square")], "grey", False),
        ("all shapes are red", [], "grey", False),
    ],
)
def test_what_prompts_mean(caption, shapes, ground, expected):
    assert holds(by_caption(caption), shapes, ground) is expected


def test_no_prompt_holds_of_an_empty_picture():
    assert not any(holds(prompt, (), ground) for prompt in EVERY for ground in (DEFAULT_GROUND, prompt.ground, None))
