"""Every prompt of the corpus, by skill: all combinations of the vocabulary, each in a few phrasings."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import permutations, product

from train.shapes.scene import COLORS, DOTS, KINDS, NAMED_GROUNDS, RELATIONS, SPLITS, Group, Prompt, split_of

_NUMBERS = {2: "two", 3: "three", 4: "four"}
_RELATION_WORDS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def _attribute() -> Iterator[Prompt]:
    for c, k in product(COLORS, KINDS):
        groups = (Group(1, k, c),)
        yield Prompt("attribute", _a(f"{c} {k}"), groups)
        yield Prompt("attribute", f"{_a(k)} that is {c}", groups)
        yield Prompt("attribute", f"a picture of {_a(f'{c} {k}')}", groups)
        yield Prompt("attribute", f"there is {_a(f'{c} {k}')}", groups)


def _scene() -> Iterator[Prompt]:
    for c, k, ground in product(COLORS, KINDS, NAMED_GROUNDS):
        if c != ground:
            groups = (Group(1, k, c),)
            yield Prompt("scene", f"{_a(f'{c} {k}')} on {_a(ground)} background", groups, ground=ground)
            yield Prompt("scene", f"{_a(ground)} background with {_a(f'{c} {k}')}", groups, ground=ground)


def _pairs() -> Iterator[tuple[str, str, str, str]]:
    """(color, kind, color, kind) of two shapes that differ in both."""
    for (c1, c2), (k1, k2) in product(permutations(COLORS, 2), permutations(KINDS, 2)):
        yield c1, k1, c2, k2


def _spatial() -> Iterator[Prompt]:
    for (c1, k1, c2, k2), relation in product(_pairs(), RELATIONS):
        groups = (Group(1, k1, c1), Group(1, k2, c2))
        a, b, words = _a(f"{c1} {k1}"), _a(f"{c2} {k2}"), _RELATION_WORDS[relation]
        yield Prompt("spatial", f"{a} {words} {b}", groups, relation=relation)
        yield Prompt("spatial", f"{a} is {words} {b}", groups, relation=relation)


def _part() -> Iterator[Prompt]:
    for c, k, dot in product(COLORS, KINDS, DOTS):
        groups = (Group(1, k, c, dot=dot),)
        yield Prompt("part", f"{_a(f'{c} {k}')} with {_a(dot)} dot", groups)
        yield Prompt("part", f"{_a(f'{c} {k}')} with {_a(dot)} dot in the middle", groups)


def _counting() -> Iterator[Prompt]:
    for c, k in product(COLORS, KINDS):
        yield Prompt("counting", f"exactly one {c} {k}", (Group(1, k, c),))
        yield Prompt("counting", f"one {c} {k}", (Group(1, k, c),))
        for n, word in _NUMBERS.items():
            yield Prompt("counting", f"{word} {c} {_plural(k)}", (Group(n, k, c),))
            yield Prompt("counting", f"a picture of {word} {c} {_plural(k)}", (Group(n, k, c),))


def _comparison() -> Iterator[Prompt]:
    for c1, k1, c2, k2 in _pairs():
        large, small = Group(1, k1, c1, size="large"), Group(1, k2, c2, size="small")
        yield Prompt("comparison", f"a large {c1} {k1} and a small {c2} {k2}", (large, small))
        yield Prompt("comparison", f"{_a(f'{c1} {k1}')} larger than {_a(f'{c2} {k2}')}", (large, small))
        yield Prompt("comparison", f"{_a(f'{c2} {k2}')} smaller than {_a(f'{c1} {k1}')}", (large, small))
    for k1, k2 in permutations(KINDS, 2):
        groups = (Group(None, k1), Group(None, k2))
        yield Prompt("comparison", f"more {_plural(k1)} than {_plural(k2)}", groups, relation="more than")
        yield Prompt("comparison", f"fewer {_plural(k2)} than {_plural(k1)}", groups, relation="more than")


def _differentiation() -> Iterator[Prompt]:
    for n, word in ((3, "three"), (4, "four")):
        for k, (c1, c2) in product(KINDS, permutations(COLORS, 2)):
            groups = (Group(1, k, c1), Group(n - 1, k, c2))
            yield Prompt("differentiation", f"{word} {_plural(k)}, one is {c1} and the others are {c2}", groups)
            yield Prompt("differentiation", f"{word} {_plural(k)}, all {c2} except for one that is {c1}", groups)
        for c, (k1, k2) in product(COLORS, permutations(KINDS, 2)):
            groups = (Group(1, k1, c), Group(n - 1, k2, c))
            others = _plural(k2)
            yield Prompt("differentiation", f"{word} {c} shapes, one is {_a(k1)} and the others are {others}", groups)


def _negation() -> Iterator[Prompt]:
    for c, (k, absent) in product(COLORS, permutations(KINDS, 2)):
        groups = (Group(1, k, c), Group(1))
        yield Prompt("negation", f"{_a(f'{c} {k}')} next to a shape that is not {_a(absent)}", groups, absent=absent)
    for k, c in product(KINDS, COLORS):
        yield Prompt("negation", f"{_a(k)} that is not {c}", (Group(1, k),), absent=c)
        yield Prompt("negation", f"{_a(k)}, but not {_a(c)} one", (Group(1, k),), absent=c)
    for n in (2, 3):
        for c in COLORS:
            yield Prompt("negation", f"{_NUMBERS[n]} shapes, none of them {c}", (Group(n),), absent=c)
        for k in KINDS:
            yield Prompt("negation", f"{_NUMBERS[n]} shapes, no {_plural(k)}", (Group(n),), absent=k)


def _universal() -> Iterator[Prompt]:
    for c in COLORS:
        for caption in (f"all shapes are {c}", f"every shape is {c}", f"several shapes, all of them {c}"):
            yield Prompt("universal", caption, (Group(None, None, c),))
    for k in KINDS:
        every = (f"all shapes are {_plural(k)}", f"every shape is {_a(k)}", f"several shapes, all of them {_plural(k)}")
        for caption in every:
            yield Prompt("universal", caption, (Group(None, k),))


_BY_SKILL = {
    "attribute": _attribute,
    "scene": _scene,
    "spatial": _spatial,
    "part": _part,
    "counting": _counting,
    "comparison": _comparison,
    "differentiation": _differentiation,
    "negation": _negation,
    "universal": _universal,
}


@cache
def all_prompts(skill: str, split: str) -> tuple[Prompt, ...]:
    """All prompts of one of SKILLS in one of SPLITS, in a fixed order; captions are distinct over all skills.

    Raises KeyError for an unknown skill and ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, want one of {', '.join(SPLITS)}")
    return tuple(prompt for prompt in _BY_SKILL[skill]() if split_of(prompt) == split)
