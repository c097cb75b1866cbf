"""Scenes for a prompt: what it leaves open is drawn at random, then the shapes are placed without touching.

One shape stands large near the middle; a relation's two shapes stand on its axis; a large and a small one stand side
by side; anything else stands on a loose 2 x 2 grid. The figures keep shapes >= 2 pixels apart at 32 x 32.
"""

from __future__ import annotations

import numpy as np

from train.shapes.scene import (
    COLORS,
    DEFAULT_GROUND,
    KINDS,
    MAX_SHAPES,
    Group,
    Prompt,
    Scene,
    Shape,
    holds,
    is_held_out,
    split_of,
)

_GRID = ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74))
_MAX_DRAWS = 10_000  # a free prompt satisfies all conditions within tens of draws


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _counts(rng: np.random.Generator, prompt: Prompt) -> list[int]:
    """How many shapes each group gets; open counts are drawn."""
    if prompt.relation == "more than":
        return [int(rng.integers(2, MAX_SHAPES)), 1]
    return [int(rng.integers(2, MAX_SHAPES + 1)) if g.count is None else g.count for g in prompt.groups]


def _members(rng: np.random.Generator, prompt: Prompt) -> list[tuple[str, str, Group]]:
    """(kind, color, group) of every shape, in the order of the groups."""
    members = []
    for group, count in zip(prompt.groups, _counts(rng, prompt), strict=True):
        # "three circles" of no given colour: the colour is shared by chance only.
        for _ in range(count):
            members.append((group.kind or _pick(rng, KINDS), group.color or _pick(rng, COLORS), group))
    return members


def _boxes(rng: np.random.Generator, prompt: Prompt, members: list[tuple[str, str, Group]]) -> list[tuple]:
    """(x, y, size) of every shape."""
    n = len(members)
    if n == 1:
        low, high = (0.60, 0.66) if members[0][2].dot else (0.58, 0.62)
        return [(*rng.uniform(0.48, 0.52, 2), rng.uniform(low, high))]
    if members[0][2].size == "large":
        mirror, upright = rng.integers(2, size=2)
        boxes = [
            (0.30 + rng.uniform(-0.02, 0.02), rng.uniform(0.36, 0.64), rng.uniform(0.46, 0.50)),
            (0.80 + rng.uniform(-0.02, 0.02), rng.uniform(0.30, 0.70), rng.uniform(0.25, 0.28)),
        ]
        boxes = [(1 - x if mirror else x, y, size) for x, y, size in boxes]
        return [(y, x, size) if upright else (x, y, size) for x, y, size in boxes]
    jitter = rng.uniform(-0.025, 0.025, (n, 2))
    sizes = rng.uniform(0.31, 0.36, n)
    if prompt.relation in ("left of", "right of", "above", "below"):
        along = np.array([0.26, 0.74] if prompt.relation in ("left of", "above") else [0.74, 0.26]) + jitter[:, 0]
        across = rng.uniform(0.40, 0.60, 2)
        xy = (along, across) if prompt.relation in ("left of", "right of") else (across, along)
        return [(xy[0][i], xy[1][i], sizes[i]) for i in range(2)]
    cells = rng.permutation(len(_GRID))[:n]
    return [(_GRID[c][0] + dx, _GRID[c][1] + dy, size) for c, (dx, dy), size in zip(cells, jitter, sizes, strict=True)]


def sample_scene(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """One scene that satisfies `prompt`, drawn with `rng`.

    A prompt of the training distribution gives a scene that shows nothing held out. Raises ValueError if no scene
    satisfies the prompt.
    """
    train = split_of(prompt) == "train-distribution"
    ground = prompt.ground or DEFAULT_GROUND
    for _ in range(_MAX_DRAWS):
        members = _members(rng, prompt)
        boxes = _boxes(rng, prompt, members)
        # Rounded so that JSON stays short; 1e-4 of the side is far below a pixel.
        shapes = tuple(
            Shape(kind, color, round(float(x), 4), round(float(y), 4), round(float(size), 4), group.dot)
            for (kind, color, group), (x, y, size) in zip(members, boxes, strict=True)
        )
        if holds(prompt, shapes, ground) and not (train and is_held_out(shapes)):
            return Scene(prompt, ground, shapes)
    raise ValueError(f"no scene satisfies {prompt.caption!r}")
