"""Draws a scene: uint8 pixels from plain arithmetic, so the same scene gives the same bytes everywhere."""

from __future__ import annotations

import numpy as np

from train.shapes.scene import RGB, Scene, Shape

SUPERSAMPLING = 4  # samples per pixel and axis
DOT_SIZE = 0.30  # the dot's diameter over the shape's size
_ARM = 0.18  # half the width of a cross's arms, over its size
# How far below the box's centre the dot stands, over the size: a triangle is too narrow there.
_DOT_DOWN = {"triangle": 0.17}


def inside(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points are inside a shape of the given kind, whose bounding box is [-0.5, 0.5]^2; v points down.

    u and v are float arrays that broadcast; returns bool of their common shape. Raises ValueError for an unknown kind.
    """
    if kind == "circle":
        return u * u + v * v <= 0.25
    if kind == "square":
        return (abs(u) <= 0.5) & (abs(v) <= 0.5)
    if kind == "triangle":
        return (abs(u) <= (v + 0.5) / 2) & (v <= 0.5)
    if kind == "cross":
        arm_u, arm_v = abs(u) <= _ARM, abs(v) <= _ARM
        return (arm_u & (abs(v) <= 0.5)) | (arm_v & (abs(u) <= 0.5))
    if kind == "diamond":
        return abs(u) + abs(v) <= 0.5
    raise ValueError(f"kind: got {kind!r}, want one of circle, square, triangle, cross, diamond")


def coverage(kind: str, x: float, y: float, width: float, height: float, rows: int, columns: int) -> np.ndarray:
    """The share of each pixel's area that a shape covers, float64 [rows, columns] in [0, 1].

    The shape's bounding box is width x height pixels, centred at (x, y).
    """
    s = SUPERSAMPLING
    u = ((np.arange(columns * s) + 0.5) / s - x) / width
    v = ((np.arange(rows * s) + 0.5) / s - y) / height
    hits = inside(kind, u[None, :], v[:, None])
    return hits.reshape(rows, s, columns, s).sum(axis=(1, 3)) / (s * s)


def _paint(canvas: np.ndarray, kind: str, x: float, y: float, size: float, color: str) -> None:
    """Blends one shape into canvas, float64 [side, side, 3], touching its bounding box only."""
    side = canvas.shape[0]
    left, top = max(0, int(x - size / 2)), max(0, int(y - size / 2))
    right, bottom = min(side, int(x + size / 2) + 1), min(side, int(y + size / 2) + 1)
    alpha = coverage(kind, x - left, y - top, size, size, bottom - top, right - left)[:, :, None]
    box = canvas[top:bottom, left:right]
    box += alpha * (np.array(RGB[color], dtype=np.float64) - box)


def _paint_shape(canvas: np.ndarray, shape: Shape) -> None:
    if shape.kind is None:
        raise ValueError("kind: got None, which is a scorer's finding and cannot be drawn")
    side = canvas.shape[0]
    x, y, size = shape.x * side, shape.y * side, shape.size * side
    _paint(canvas, shape.kind, x, y, size, shape.color)
    if shape.dot is not None:
        _paint(canvas, "circle", x, y + _DOT_DOWN.get(shape.kind, 0.0) * size, DOT_SIZE * size, shape.dot)


def render(scene: Scene, side: int) -> np.ndarray:
    """The scene as uint8 [side, side, 3] RGB, antialiased; `side` is in pixels and at least 32.

    Raises ValueError if side is smaller (shapes could no longer be told apart) or a shape's kind is None.
    """
    if side < 32:
        raise ValueError(f"side: got {side}, want at least 32 pixels")
    canvas = np.empty((side, side, 3), dtype=np.float64)
    canvas[:] = RGB[scene.ground]
    for shape in scene.shapes:
        _paint_shape(canvas, shape)
    return np.rint(canvas).astype(np.uint8)
