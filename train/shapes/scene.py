"""What a picture of the shapes corpus holds: vocabulary, shapes, prompts, and the scenes that satisfy a prompt.

A `Prompt` is a caption with its meaning as data: groups of shapes that must be there and nothing else, and possibly
a ground, a relation, or something that must be absent. A `Scene` is one way to satisfy a prompt, ready to be drawn.
`holds` decides whether a list of shapes satisfies a prompt; the scorer calls it on what it finds in a picture.

Lengths and positions are fractions of the picture's side: x to the right, y downwards, (0, 0) the top left corner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

# Every edge between a shape and a ground or dot passes at a distance > 60 from all third shape colours, so that
# antialiased pixels are never mistaken for another colour (the scorer's reject distance; held by a test).
RGB = {
    "red": (220, 30, 40),
    "orange": (250, 130, 20),
    "yellow": (250, 225, 50),
    "green": (30, 160, 60),
    "cyan": (0, 195, 215),
    "blue": (30, 70, 220),
    "purple": (170, 60, 230),
    "grey": (200, 200, 200),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
KINDS = ("circle", "square", "triangle", "cross", "diamond")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple")
DOTS = ("white", "black")
DEFAULT_GROUND = "grey"  # of every picture whose caption names no ground; never named in a caption
NAMED_GROUNDS = ("white", "black")
RELATIONS = ("left of", "right of", "above", "below")
SKILLS = (
    "attribute",
    "scene",
    "spatial",
    "part",
    "counting",
    "comparison",
    "differentiation",
    "negation",
    "universal",
)

HELD_OUT_COMBINATIONS = frozenset(
    {("purple", "circle"), ("orange", "square"), ("blue", "triangle"), ("green", "cross"), ("red", "diamond")}
)
HELD_OUT_COUNTS = frozenset({(2, "square"), (3, "circle"), (4, "triangle")})
# Closed under saying the same thing the other way round.
HELD_OUT_RELATIONS = frozenset(
    {
        ("circle", "left of", "square"),
        ("square", "right of", "circle"),
        ("triangle", "above", "cross"),
        ("cross", "below", "triangle"),
    }
)
SPLITS = ("train-distribution", "held-out-combination", "held-out-count", "held-out-relation")

MAX_SHAPES = 4  # the 2 x 2 grid that several shapes are placed on
LARGE_RATIO = 1.3  # a "large" shape is at least this many times as wide as a "small" one; drawn ones are > 1.6
RELATION_MARGIN = 0.15  # centres must be this far apart along the relation's axis; drawn ones are > 0.4


@dataclass(frozen=True)
class Shape:
    """One shape: its bounding box is the square of side `size` centred at (x, y); `dot` colours its inner dot."""

    kind: str | None  # None only in the scorer's findings: a blob that is none of KINDS
    color: str
    x: float
    y: float
    size: float
    dot: str | None = None


@dataclass(frozen=True)
class Group:
    """`count` shapes that a prompt asks for; None leaves count, kind, color, size or dot open (dot None: no dot)."""

    count: int | None = 1
    kind: str | None = None
    color: str | None = None
    size: str | None = None  # "large" or "small"
    dot: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A caption and what it asserts: the picture holds exactly `groups`, on `ground`, in `relation`, without `absent`.

    `relation` is between groups[0] and groups[1]: one of RELATIONS, or "more than" between two groups of open count.
    `absent` is a kind or a color that must not occur.
    """

    skill: str
    caption: str
    groups: tuple[Group, ...]
    ground: str | None = None
    relation: str | None = None
    absent: str | None = None


@dataclass(frozen=True)
class Scene:
    """A picture that satisfies `prompt`: its ground colour and its shapes, none of which touch."""

    prompt: Prompt
    ground: str
    shapes: tuple[Shape, ...]

    def to_json(self) -> dict[str, Any]:
        """The scene as plain dicts, lists, strings and numbers; `from_json` gives an equal scene back."""
        plain = asdict(self)
        plain["shapes"] = list(plain["shapes"])
        plain["prompt"]["groups"] = list(plain["prompt"]["groups"])
        return plain

    @staticmethod
    def from_json(plain: dict[str, Any]) -> Scene:
        """The scene of `to_json`'s dict. Raises KeyError or TypeError if it is not one."""
        prompt = dict(plain["prompt"])
        prompt["groups"] = tuple(Group(**group) for group in prompt["groups"])
        return Scene(Prompt(**prompt), plain["ground"], tuple(Shape(**shape) for shape in plain["shapes"]))


def _fits(shape: Shape, group: Group) -> bool:
    return (
        shape.kind is not None
        and shape.dot == group.dot
        and group.kind in (None, shape.kind)
        and group.color in (None, shape.color)
    )


def relation_holds(relation: str, a: Shape, b: Shape) -> bool:
    """Whether `a` is left of, right of, above or below `b`: clearly so, and more than it is displaced otherwise."""
    dx, dy = b.x - a.x, b.y - a.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > RELATION_MARGIN and along > abs(across)


def _members_hold(prompt: Prompt, members: list[list[Shape]]) -> bool:
    for group, shapes in zip(prompt.groups, members, strict=True):
        if group.count is not None and len(shapes) != group.count:
            return False
        # "all shapes are red" speaks of at least two; beside another group, one is enough.
        if group.count is None and len(shapes) < (2 if len(prompt.groups) == 1 else 1):
            return False
    large = [s.size for g, m in zip(prompt.groups, members, strict=True) if g.size == "large" for s in m]
    small = [s.size for g, m in zip(prompt.groups, members, strict=True) if g.size == "small" for s in m]
    if large and small and min(large) < LARGE_RATIO * max(small):
        return False
    if prompt.relation == "more than":
        return len(members[0]) > len(members[1])
    if prompt.relation is not None:
        return relation_holds(prompt.relation, members[0][0], members[1][0])
    return True


def holds(prompt: Prompt, shapes: Sequence[Shape], ground: str | None) -> bool:
    """Whether a picture with exactly these shapes on this ground shows what the prompt says.

    Every shape must belong to one of the prompt's groups, so surplus shapes and unknown blobs fail it, and every
    group must be filled, so an empty picture fails every prompt.
    """
    if not 1 <= len(shapes) <= MAX_SHAPES:
        return False
    if prompt.ground is not None and ground != prompt.ground:
        return False
    if prompt.absent is not None and any(prompt.absent in (s.kind, s.color) for s in shapes):
        return False
    for assignment in product(range(len(prompt.groups)), repeat=len(shapes)):
        if all(_fits(shape, prompt.groups[g]) for shape, g in zip(shapes, assignment, strict=True)):
            members = [
                [s for s, g in zip(shapes, assignment, strict=True) if g == i] for i in range(len(prompt.groups))
            ]
            if _members_hold(prompt, members):
                return True
    return False


def is_held_out(shapes: Sequence[Shape]) -> bool:
    """Whether the shapes show a held-out combination, a held-out count of a kind, or a held-out relation of a pair."""
    if any((s.color, s.kind) in HELD_OUT_COMBINATIONS for s in shapes):
        return True
    if any((count, kind) in HELD_OUT_COUNTS for kind, count in Counter(s.kind for s in shapes).items()):
        return True
    return len(shapes) == 2 and any(
        (a.kind, relation, b.kind) in HELD_OUT_RELATIONS and relation_holds(relation, a, b)
        for a, b in (shapes, shapes[::-1])
        for relation in RELATIONS
    )


def split_of(prompt: Prompt) -> str | None:
    """The split a prompt's own words put it in; None if it is held out in more than one way, and so not used."""
    splits = []
    if any((g.color, g.kind) in HELD_OUT_COMBINATIONS for g in prompt.groups):
        splits.append("held-out-combination")
    counts: Counter[str] = Counter()
    for g in prompt.groups:
        if g.kind is not None and g.count is not None:
            counts[g.kind] += g.count
    if any((count, kind) in HELD_OUT_COUNTS for kind, count in counts.items()):
        splits.append("held-out-count")
    if len(prompt.groups) == 2 and prompt.relation is not None:
        a, b = prompt.groups
        if (a.kind, prompt.relation, b.kind) in HELD_OUT_RELATIONS:
            splits.append("held-out-relation")
    if len(splits) > 1:
        return None
    return splits[0] if splits else "train-distribution"
