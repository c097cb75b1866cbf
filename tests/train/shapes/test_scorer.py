"""Gates on the scorer: exact on truth, chance on shuffled captions, nothing on empty or garbage pictures."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from train.shapes.captions import all_prompts
from train.shapes.corpus import ShapesArguments, choose_captions, choose_samples
from train.shapes.layout import sample_scene
from train.shapes.render import render
from train.shapes.scene import (
    COLORS,
    DEFAULT_GROUND,
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
)
from train.shapes.scorer import SINGLE_SKILLS, find, score, score_batch

ANY = Prompt("attribute", "a red circle", (Group(1, "circle", "red"),))


@cache
def truth(per_skill: int = 50) -> tuple[Scene, ...]:
    """Scenes of every skill, half of them from each skill's held-out splits where it has any."""
    rng = np.random.default_rng(11)
    scenes = []
    for skill in SKILLS:
        held_out = [prompt for split in SPLITS[1:] for prompt in all_prompts(skill, split)]
        for i in range(per_skill):
            pool = held_out if held_out and i % 2 else all_prompts(skill, SPLITS[0])
            scenes.append(sample_scene(pool[rng.integers(len(pool))], rng))
    return tuple(scenes)


@cache
def mixed(count: int = 300) -> tuple[Scene, ...]:
    """Scenes in the proportions of the default corpus."""
    arguments = ShapesArguments()
    rng = np.random.default_rng(12)
    prompts = choose_samples(choose_captions(arguments), count, arguments.mix, rng, each=False)
    return tuple(sample_scene(prompt, rng) for prompt in prompts)


def noisy(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.rint(image + rng.normal(0, sigma, image.shape)), 0, 255).astype(np.uint8)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.rint(gaussian_filter(image.astype(np.float64), (sigma, sigma, 0))).astype(np.uint8)


def assert_all_right(result: dict) -> None:
    assert result["passed"] == 1
    assert {skill: rates["passed"] for skill, rates in result["skills"].items()} == dict.fromkeys(SKILLS, 1)
    assert result["single"]["color"] == result["single"]["shape"] == 1


@pytest.mark.parametrize("side", [32, 64])
def test_truth_scores_everything(side):
    scenes = truth()
    result = score_batch(scenes, [render(scene, side) for scene in scenes])
    assert result["count"] == 50 * len(SKILLS)
    assert_all_right(result)


@pytest.mark.parametrize("side", [48, 100, 128, 256])
def test_truth_scores_everything_at_other_sides(side):
    scenes = truth()[::5]
    assert_all_right(score_batch(scenes, [render(scene, side) for scene in scenes]))


def test_what_is_found_is_what_was_drawn():
    for scene in truth()[::3]:
        findings = find(render(scene, 64))
        assert findings.ground == scene.ground
        assert len(findings.shapes) == len(scene.shapes)
        for drawn in scene.shapes:
            found = min(findings.shapes, key=lambda s: abs(s.x - drawn.x) + abs(s.y - drawn.y))
            assert (found.kind, found.color, found.dot) == (drawn.kind, drawn.color, drawn.dot)
            assert (found.x, found.y, found.size) == pytest.approx((drawn.x, drawn.y, drawn.size), abs=0.012)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize(("noise", "blur"), [(8, 0.0), (0, 0.6), (8, 0.5)])
def test_mild_noise_and_blur_change_little(side, noise, blur):
    scenes = truth()[::2]
    rng = np.random.default_rng(5)
    images = [noisy(blurred(render(scene, side), blur * side / 32), noise, rng) for scene in scenes]
    result = score_batch(scenes, images)
    assert result["passed"] > 0.97
    assert min(rates["passed"] for rates in result["skills"].values()) > 0.9


def test_washed_out_colours_are_still_told_apart():
    scenes = truth()[::4]
    images = [np.rint(render(scene, 32) * 0.85 + 0.15 * 128).astype(np.uint8) for scene in scenes]
    assert score_batch(scenes, images)["passed"] == 1


def test_shuffled_captions_score_at_chance():
    scenes = mixed()
    n = len(scenes)
    # Chance: the share of all (caption, picture) pairs in which the one is true of the other, the own pair left out.
    pairs = np.array([[holds(a.prompt, b.shapes, b.ground) for b in scenes] for a in scenes])
    assert pairs.diagonal().all()
    chance = (pairs.sum() - n) / (n * (n - 1))
    assert chance < 0.06
    shift = 101
    order = [(i + shift) % n for i in range(n)]
    result = score_batch(scenes, [render(scenes[j], 32) for j in order])
    assert result["passed"] == np.mean([pairs[i, j] for i, j in enumerate(order)])
    assert abs(result["passed"] - chance) < 4 * np.sqrt(chance * (1 - chance) / n)


def test_colour_and_shape_of_shuffled_single_objects_are_at_chance():
    scenes = [scene for scene in mixed(900) if scene.prompt.skill in SINGLE_SKILLS]
    n = len(scenes)
    images = [render(scene, 32) for scene in scenes]
    order = np.random.default_rng(6).permutation(n)
    single = score_batch(scenes, [images[j] for j in order])["single"]
    assert single["count"] == n
    for rate, values in (
        (single["color"], Counter(scene.shapes[0].color for scene in scenes)),
        (single["shape"], Counter(scene.shapes[0].kind for scene in scenes)),
    ):
        chance = sum((count / n) ** 2 for count in values.values())
        assert abs(rate - chance) < 4 * np.sqrt(chance * (1 - chance) / n)
        assert chance == pytest.approx(1 / len(values), abs=0.02)


@pytest.mark.parametrize("ground", [DEFAULT_GROUND, *NAMED_GROUNDS])
def test_an_empty_picture_passes_nothing_negations_included(ground):
    image = np.full((32, 32, 3), RGB[ground], dtype=np.uint8)
    noise = noisy(image, 8, np.random.default_rng(0))
    for picture in (image, noise):
        findings = find(picture)
        assert findings.ground == ground
        assert findings.shapes == ()
    prompts = [prompt for skill in SKILLS for prompt in all_prompts(skill, SPLITS[0])[::11]]
    prompts += all_prompts("negation", SPLITS[0])
    assert not any(holds(prompt, (), ground) for prompt in prompts)
    negation = all_prompts("negation", SPLITS[0])[-1]
    assert score(negation, image).passed is False


def garbage(name: str, side: int, rng: np.random.Generator) -> np.ndarray:
    if name == "uniform":
        return rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    if name == "palette":
        return np.array(list(RGB.values()), dtype=np.uint8)[rng.integers(0, len(RGB), (side, side))]
    if name == "smooth":
        field = gaussian_filter(rng.normal(size=(side, side, 3)), (2, 2, 0))
        return np.clip(128 + 90 * field / field.std(), 0, 255).astype(np.uint8)
    return np.full((side, side, 3), rng.integers(90, 165), dtype=np.uint8)  # flat, of no palette colour


@pytest.mark.parametrize("name", ["uniform", "palette", "smooth", "flat"])
@pytest.mark.parametrize("side", [32, 64])
def test_garbage_passes_nothing(name, side):
    rng = np.random.default_rng(7)
    for scene in truth()[::20]:
        result = score(scene, garbage(name, side, rng))
        assert not result.passed
        assert not result.color
        assert not result.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_blob_that_is_no_kind_is_found_without_one(kind):
    image = render(Scene(ANY, "grey", (Shape(kind, "red", 0.5, 0.5, 0.6),)), 32)
    image[:, 16:] = RGB["grey"]  # half a shape
    image[14:18, 2:30] = RGB["red"]  # with a bar across
    (found,) = find(image).shapes
    assert found.kind is None
    assert found.color == "red"


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("kind", KINDS)
def test_colour_and_kind_are_scored_apart(color, kind):
    image = render(Scene(ANY, "grey", (Shape(kind, color, 0.5, 0.5, 0.55),)), 32)
    result = score(ANY, image)
    assert result.color is (color == "red")
    assert result.shape is (kind == "circle")
    assert result.passed is (color == "red" and kind == "circle")


def test_shapes_of_two_colours_that_touch_are_two():
    image = np.full((32, 32, 3), RGB["grey"], dtype=np.uint8)
    image[10:22, 4:16] = RGB["red"]
    image[10:22, 16:28] = RGB["blue"]
    assert [(s.kind, s.color) for s in find(image).shapes] == [("square", "red"), ("square", "blue")]


def test_a_hole_that_shows_the_ground_is_no_dot():
    image = render(Scene(ANY, "grey", (Shape("circle", "red", 0.5, 0.5, 0.6, dot="white"),)), 64)
    image[(image == 255).all(axis=2)] = RGB["grey"]
    (found,) = find(image).shapes
    assert found.dot is None


def test_two_dots_are_no_part():
    image = render(Scene(ANY, "grey", (Shape("square", "red", 0.5, 0.5, 0.6),)), 64)
    image[24:32, 18:26] = image[24:32, 38:46] = 255
    (found,) = find(image).shapes
    assert found.kind is None


def test_a_speck_is_not_a_shape():
    image = render(Scene(ANY, "grey", (Shape("circle", "red", 0.5, 0.6, 0.5),)), 32)
    image[1:3, 1:3] = RGB["blue"]
    assert score(ANY, image).passed


@settings(max_examples=40, deadline=None)
@given(st.integers(32, 140), st.integers(32, 140), st.integers(0, 2**32 - 1))
def test_any_picture_gets_a_finding(height, width, seed):
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), RGB["grey"], dtype=np.uint8)
    for _ in range(rng.integers(0, 6)):
        top, left = rng.integers(0, height), rng.integers(0, width)
        image[top : top + rng.integers(1, 50), left : left + rng.integers(1, 50)] = list(RGB.values())[rng.integers(10)]
    findings = find(image)
    sizes = [s.size for s in findings.shapes]
    assert all(s.kind in (*KINDS, None) and s.color in RGB and s.color != findings.ground for s in findings.shapes)
    assert all(0 < size < 2 for size in sizes)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 32, 3), np.float32),
        np.zeros((32, 32), np.uint8),
        np.zeros((32, 32, 4), np.uint8),
        np.zeros((31, 64, 3), np.uint8),
    ],
)
def test_other_images_are_refused(image):
    with pytest.raises(ValueError, match=r"image: got .* want uint8 \[H, W, 3\]"):
        find(image)


def test_batch_rates_and_counts():
    red = render(Scene(ANY, "grey", (Shape("circle", "red", 0.5, 0.5, 0.5),)), 32)
    counting = Prompt("counting", "one blue circle", (Group(1, "circle", "blue"),))
    square = Prompt("attribute", "a red square", (Group(1, "square", "red"),))
    assert score_batch([ANY, square, counting], np.stack([red, red, red])) == {
        "count": 3,
        "passed": 1 / 3,
        "skills": {"attribute": {"count": 2, "passed": 0.5}, "counting": {"count": 1, "passed": 0.0}},
        "single": {"count": 2, "color": 1.0, "shape": 0.5},
    }
    assert score_batch([], [])["single"] == {"count": 0, "color": None, "shape": None}
    with pytest.raises(ValueError, match="images: got 1 for 2 prompts"):
        score_batch([ANY, square], [red])
