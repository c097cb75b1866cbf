"""Pixels of a scene: values, areas and determinism."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.shapes.captions import all_prompts
from train.shapes.layout import sample_scene
from train.shapes.render import coverage, inside, render
from train.shapes.scene import KINDS, RGB, SKILLS, SPLITS, Group, Prompt, Scene, Shape

PROMPT = Prompt("attribute", "a red square", (Group(1, "square", "red"),))
AREAS = {"circle": np.pi / 4, "square": 1, "triangle": 1 / 2, "cross": 2 * 0.36 - 0.36**2, "diamond": 1 / 2}


def test_pixels_of_a_square_aligned_with_the_grid():
    scene = Scene(PROMPT, "white", (Shape("square", "red", 0.5, 0.5, 0.5),))
    expected = np.full((32, 32, 3), 255, dtype=np.uint8)
    expected[8:24, 8:24] = RGB["red"]
    np.testing.assert_array_equal(render(scene, 32), expected)


def test_an_edge_pixel_is_the_mix_by_area():
    # The left edge at 8.5 covers half of column 8, the right edge at 24.5 half of column 24.
    scene = Scene(PROMPT, "black", (Shape("square", "white", 16.5 / 32, 0.5, 0.5),))
    row = render(scene, 32)[16, :, 0]
    assert row[[7, 8, 9, 23, 24, 25]].tolist() == [0, 128, 255, 255, 128, 0]


def test_the_dot_is_drawn_inside():
    scene = Scene(PROMPT, "grey", (Shape("circle", "red", 0.5, 0.5, 0.6, dot="white"),))
    image = render(scene, 64)
    assert image[32, 32].tolist() == [255, 255, 255]
    assert image[32, 16].tolist() == list(RGB["red"])
    assert image[0, 0].tolist() == list(RGB["grey"])


@pytest.mark.parametrize("kind", KINDS)
def test_area_of_each_kind(kind):
    assert coverage(kind, 100, 100, 160, 160, 200, 200).sum() / 160**2 == pytest.approx(AREAS[kind], rel=0.01)


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind: got 'blob'"):
        inside("blob", np.zeros(1), np.zeros(1))


def test_too_small_a_side_is_refused():
    with pytest.raises(ValueError, match="side: got 31, want at least 32"):
        render(Scene(PROMPT, "white", ()), 31)


def test_a_shape_without_a_kind_is_refused():
    with pytest.raises(ValueError, match="kind: got None"):
        render(Scene(PROMPT, "white", (Shape(None, "red", 0.5, 0.5, 0.5),)), 32)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SKILLS), st.integers(0, 2**32 - 1), st.integers(32, 130))
def test_any_scene_at_any_side(skill, seed, side):
    rng = np.random.default_rng(seed)
    prompts = all_prompts(skill, SPLITS[0])
    scene = sample_scene(prompts[rng.integers(len(prompts))], rng)
    image = render(scene, side)
    assert image.dtype == np.uint8
    assert image.shape == (side, side, 3)
    assert (image[0, 0] == RGB[scene.ground]).all()
    np.testing.assert_array_equal(image, render(scene, side))


def test_the_same_scene_gives_the_same_bytes_everywhere():
    shapes = (
        Shape("circle", "blue", 0.2613, 0.2571, 0.3321, dot="white"),
        Shape("triangle", "orange", 0.7402, 0.2666, 0.3499),
        Shape("cross", "cyan", 0.2519, 0.7433, 0.3107),
        Shape("diamond", "purple", 0.7391, 0.7287, 0.3555, dot="black"),
    )
    pixels = render(Scene(PROMPT, "grey", shapes), 32).tobytes()
    assert hashlib.sha256(pixels).hexdigest() == "15855c6ce98d62ff9befce3e5bedf7dba5a3495b18e393d124d40f3db292ad9d"
