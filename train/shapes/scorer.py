"""Finds the shapes in a picture and decides whether the picture shows what a prompt says.

Nearest palette colour with a reject class -> connected components -> silhouette -> kind by overlap with drawn
templates. A blob that is none of the kinds is found too, with kind None, and fails every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from train.shapes.components import connected_components
from train.shapes.render import coverage
from train.shapes.scene import (
    DEFAULT_GROUND,
    KINDS,
    NAMED_GROUNDS,
    RGB,
    SKILLS,
    Prompt,
    Scene,
    Shape,
    holds,
)

REJECT_DISTANCE = 60.0  # in RGB units of 0..255; an edge's mixed colours stay further than this from third colours
MIN_OVERLAP = 0.78  # of a silhouette with its best template, intersection over union; drawn shapes have > 0.8
MIN_AREA = 0.008  # of the picture; smaller components are specks
MAX_REJECTED = 0.40  # of the picture; more pixels of no palette colour make it noise
FAINT = 0.25  # a pixel less covered than this is no part of a silhouette
MIN_BORDER = 0.50  # of the picture's border that the ground must hold
MAX_ASPECT = 1.4  # of a bounding box; every kind's is square
SINGLE_SKILLS = ("attribute", "scene")  # the prompts for one object, whose color and shape are scored apart

_NAMES = tuple(RGB)
_PALETTE = np.array([RGB[name] for name in _NAMES], dtype=np.float32)
_GROUNDS = (DEFAULT_GROUND, *NAMED_GROUNDS)
_DEFAULT = _NAMES.index(DEFAULT_GROUND)  # never a shape's colour: its label off the ground is an edge


@dataclass(frozen=True)
class Findings:
    """What a picture holds: its ground colour, None if it has none, and its shapes, the largest first."""

    ground: str | None
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Score:
    """Whether the prompt's assertion holds and, for prompts of SINGLE_SKILLS, whether color and kind are right."""

    passed: bool
    color: bool | None  # None for prompts of other skills
    shape: bool | None
    findings: Findings


@dataclass(frozen=True)
class _Blob:
    """A component's silhouette: `mask`, float [h, w] in [0, 1], whose corner is at pixel (top, left)."""

    color: str
    top: int
    left: int
    mask: np.ndarray

    def encloses(self, other: _Blob) -> bool:
        """Whether the centre of the other one lies in this one's silhouette or in a hole of it."""
        row = other.top + other.mask.shape[0] // 2 - self.top
        column = other.left + other.mask.shape[1] // 2 - self.left
        height, width = self.mask.shape
        return 0 <= row < height and 0 <= column < width and bool(_fill(self.mask)[row, column] >= 0.5)

    def shape(self, picture: tuple[int, ...], filled: bool = False) -> Shape:
        """The blob as a shape, in fractions of a picture of [H, W] pixels; `filled` fills its holes first."""
        mask = _fill(self.mask) if filled else self.mask
        kind, x, y, width, height = _fit(mask)
        return Shape(
            kind=kind,
            color=self.color,
            x=(self.left + x) / picture[1],
            y=(self.top + y) / picture[0],
            size=float(np.sqrt(width * height / (picture[0] * picture[1]))),
        )


def _moments(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Mean x, mean y, and the standard deviations of x and y of a mask's area, in pixels from its corner."""
    x, y = np.arange(mask.shape[1]) + 0.5, np.arange(mask.shape[0]) + 0.5
    columns, rows = mask.sum(axis=0), mask.sum(axis=1)
    area = columns.sum()
    mean_x, mean_y = (columns * x).sum() / area, (rows * y).sum() / area
    # A pixel is itself a square of variance 1/12.
    var_x = (columns * (x - mean_x) ** 2).sum() / area + 1 / 12
    var_y = (rows * (y - mean_y) ** 2).sum() / area + 1 / 12
    return float(mean_x), float(mean_y), float(np.sqrt(var_x)), float(np.sqrt(var_y))


@cache
def _kind_moments(kind: str) -> tuple[float, float, float, float]:
    """_moments of a shape of the kind whose bounding box is the unit square."""
    side = 128
    x, y, dx, dy = (length / side for length in _moments(coverage(kind, side / 2, side / 2, side, side, side, side)))
    return x, y, dx, dy


def _fit(mask: np.ndarray) -> tuple[str | None, float, float, float, float]:
    """The kind whose template overlaps the mask best, and the centre x, y and the width and height of its box.

    Each kind's template is drawn into the box that gives it the mask's own moments, which finds the box to a fraction
    of a pixel, tips and soft edges included. The kind is None if none overlaps well enough.
    """
    rows, columns = mask.shape
    mean_x, mean_y, dev_x, dev_y = _moments(mask)
    best: tuple[str | None, float, float, float, float] = (None, 0.0, 0.0, 0.0, 0.0)
    overlap = -1.0
    for kind in KINDS:
        x, y, dx, dy = _kind_moments(kind)
        width, height = dev_x / dx, dev_y / dy
        center_x, center_y = mean_x + (0.5 - x) * width, mean_y + (0.5 - y) * height
        template = coverage(kind, center_x, center_y, width, height, rows, columns)
        fitting = np.minimum(template, mask).sum() / np.maximum(template, mask).sum()
        if fitting > overlap:
            good = fitting >= MIN_OVERLAP and max(width, height) <= MAX_ASPECT * min(width, height)
            best, overlap = (kind if good else None, center_x, center_y, width, height), fitting
    return best


def _labels(image: np.ndarray) -> np.ndarray:
    """The index in _NAMES of every pixel's nearest palette colour, -1 where none is near: int64 [H, W]."""
    # |p - c|^2 term by term, which makes no [H, W, colours, 3] array.
    distance = (image**2).sum(axis=2)[:, :, None] - 2 * (image @ _PALETTE.T) + (_PALETTE**2).sum(axis=1)
    labels = distance.argmin(axis=2)
    labels[distance.min(axis=2) > REJECT_DISTANCE**2] = -1
    return labels


def _ground(labels: np.ndarray) -> int | None:
    """The label that holds most of the border, if it is a ground's."""
    border = np.concatenate([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    counts = np.bincount(border[border >= 0], minlength=len(_NAMES))
    best = int(counts.argmax())
    return best if counts[best] >= MIN_BORDER * border.size and _NAMES[best] in _GROUNDS else None


def _has_core(mask: np.ndarray) -> bool:
    """Whether some pixel has all four neighbours in the mask: false of the thin rings that blurred edges leave."""
    return bool((mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]).any())


def _dilate(mask: np.ndarray, reach: int) -> np.ndarray:
    """True wherever the mask is within `reach` rows."""
    padded = np.pad(mask, ((reach, reach), (0, 0)))
    return np.any([padded[i : i + mask.shape[0]] for i in range(2 * reach + 1)], axis=0)


def _blob(image: np.ndarray, labels: np.ndarray, member: np.ndarray, ground_label: int) -> _Blob:
    """One component with the pixels at its edge, which count by how far their colour is from the ground's to its own.

    image: float32 [H, W, 3]; labels: int [H, W]; member: bool [H, W].
    """
    rows, columns = np.flatnonzero(member.any(axis=1)), np.flatnonzero(member.any(axis=0))
    reach = 2  # pixels; an edge that antialiasing and slight blur make is no wider
    top, left = max(0, rows[0] - reach), max(0, columns[0] - reach)
    window = (slice(top, rows[-1] + 1 + reach), slice(left, columns[-1] + 1 + reach))
    inner = member[window]
    near = _dilate(_dilate(inner, reach).T, reach).T
    ground = image[labels == ground_label].mean(axis=0)
    step = image[member].mean(axis=0) - ground
    cover = np.clip((image[window] - ground) @ step / (step @ step), 0, 1)
    # Pixels of another shape's colour are not this one's edge, and a faint cover is noise on the ground.
    edge = near & ((labels[window] < 0) | (labels[window] == ground_label)) & (cover >= FAINT)
    mask = np.where(inner, np.maximum(cover, 0.5), np.where(edge, cover, 0))
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return _Blob(_NAMES[labels[member][0]], int(top + rows[0]), int(left + columns[0]), mask)


def _fill(mask: np.ndarray) -> np.ndarray:
    """The silhouette with its holes filled."""
    outside = np.pad(mask < 0.5, 1, constant_values=True)
    parts, _ = connected_components(np.where(outside, 0, -1))
    return np.where((outside & (parts != parts[0, 0]))[1:-1, 1:-1], 1.0, mask)


def _shrink(image: np.ndarray) -> np.ndarray:
    """The picture as float32, averaged down to a side of 64..127 pixels where it is larger: it costs and blurs less."""
    factor = max(1, min(image.shape[:2]) // 64)
    height, width = image.shape[0] // factor, image.shape[1] // factor
    cropped = image[: height * factor, : width * factor].astype(np.float32)
    return cropped.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))


def find(image: np.ndarray) -> Findings:
    """The ground and the shapes of a picture, uint8 [H, W, 3] RGB with H, W >= 32.

    A shape's kind is None if its silhouette is none of KINDS. Raises ValueError on another dtype or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 32:
        raise ValueError(f"image: got {image.dtype} {list(image.shape)}, want uint8 [H, W, 3] with H, W >= 32")
    pixels = _shrink(image)
    labels = _labels(pixels)
    ground = _ground(labels)
    if ground is None or (labels < 0).mean() > MAX_REJECTED:
        return Findings(None, ())
    components, count = connected_components(np.where((labels == ground) | (labels == _DEFAULT), -1, labels))
    areas = np.bincount(components[components >= 0], minlength=count)
    found: list[tuple[Shape, _Blob]] = []
    for i in np.argsort(-areas, kind="stable"):
        member = components == i
        if areas[i] < MIN_AREA * labels.size:
            break
        if not _has_core(member):
            continue
        blob = _blob(pixels, labels, member, ground)
        # Areas fall, so a dot comes after the shape that it lies in.
        host = next((k for k, (_, larger) in enumerate(found) if larger.encloses(blob)), None)
        if host is None:
            found.append((blob.shape(labels.shape), blob))
        else:
            shape, larger = found[host]
            # A second dot makes it none of the things that prompts speak of.
            once = larger.shape(labels.shape, filled=True) if shape.dot is None else replace(shape, kind=None)
            found[host] = (replace(once, dot=blob.color), larger)
    return Findings(_NAMES[ground], tuple(shape for shape, _ in found))


def score(prompt: Prompt | Scene, image: np.ndarray) -> Score:
    """Whether the picture, uint8 [H, W, 3] with H, W >= 32, shows what the prompt (or the scene's prompt) says.

    Raises ValueError on another dtype or shape.
    """
    if isinstance(prompt, Scene):
        prompt = prompt.prompt
    findings = find(image)
    passed = holds(prompt, findings.shapes, findings.ground)
    if prompt.skill not in SINGLE_SKILLS:
        return Score(passed, None, None, findings)
    wanted, largest = prompt.groups[0], findings.shapes[0] if findings.shapes else None
    color = largest is not None and largest.color == wanted.color
    shape = largest is not None and largest.kind == wanted.kind
    return Score(passed, color, shape, findings)


def score_batch(prompts: Sequence[Prompt | Scene], images: Sequence[np.ndarray]) -> dict[str, Any]:
    """Rates over many pictures, one for each prompt; images may be one uint8 array [N, H, W, 3].

    Returns {"count", "passed", "skills": {skill: {"count", "passed"}}, "single": {"count", "color", "shape"}}: rates
    in [0, 1], None where the count is 0. Raises ValueError if there is not one image for each prompt.
    """
    if len(prompts) != len(images):
        raise ValueError(f"images: got {len(images)} for {len(prompts)} prompts, want as many")
    asked = [prompt.prompt if isinstance(prompt, Scene) else prompt for prompt in prompts]
    scores = [score(prompt, image) for prompt, image in zip(asked, images, strict=True)]
    skills = {}
    for skill in SKILLS:
        passed = [s.passed for prompt, s in zip(asked, scores, strict=True) if prompt.skill == skill]
        if passed:
            skills[skill] = {"count": len(passed), "passed": _rate(passed)}
    single = [(s.color, s.shape) for s in scores if s.color is not None]
    return {
        "count": len(scores),
        "passed": _rate([s.passed for s in scores]),
        "skills": skills,
        "single": {
            "count": len(single),
            "color": _rate([color for color, _ in single]),
            "shape": _rate([shape for _, shape in single]),
        },
    }


def _rate(outcomes: Sequence[bool | None]) -> float | None:
    return sum(map(bool, outcomes)) / len(outcomes) if outcomes else None
