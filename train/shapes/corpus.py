"""Chooses the corpus's captions, scenes and evaluation prompts, and writes them as MDS shards and JSON lines."""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.shapes.captions import all_prompts
from train.shapes.layout import sample_scene
from train.shapes.render import render
from train.shapes.scene import SKILLS, SPLITS, Prompt, Scene

VERSION = 1  # raised whenever the same arguments give another corpus
DEFAULT_MIX = {
    "attribute": 0.45,
    "scene": 0.33,
    "spatial": 0.04,
    "part": 0.04,
    "counting": 0.04,
    "comparison": 0.03,
    "differentiation": 0.03,
    "negation": 0.02,
    "universal": 0.02,
}
COLUMNS = {"image": "bytes", "caption": "str", "meta": "json"}
TRAIN_SPLIT = SPLITS[0]
_SHARD_BYTES = 1 << 22  # small enough that even the default corpus has several shards
# What each random stream is for; a sample's own stream depends on nothing but the seed and its index.
_CAPTIONS, _PROMPTS, _TRAIN, _VAL = range(4)


class BadArgument(ValueError):
    """An argument that cannot be used; the message is one line that names it and says what is wanted."""


@dataclass(frozen=True)
class ShapesArguments:
    """What a shapes corpus depends on; the same arguments give the same bytes.

    Raises BadArgument where a value cannot be used.
    """

    samples: int = 6000  # training pictures
    captions: int = 600  # distinct captions among them
    size: int = 32  # side of the pictures in pixels
    seed: int = 0
    val: int = 256  # validation pictures: new scenes for captions of the training set
    prompts: int = 12  # evaluation prompts for each skill and split
    mix: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_MIX))  # skill -> share of the pictures
    compression: str = "none"  # of the shards: "none" or "zstd"

    def __post_init__(self) -> None:
        for name, low in (("samples", 1), ("captions", 1), ("size", 32), ("seed", 0), ("val", 1), ("prompts", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise BadArgument(f"{name}: got {value!r}, want a whole number of at least {low}")
        if self.captions > self.samples:
            raise BadArgument(f"captions: got {self.captions}, want at most samples, which is {self.samples}")
        unknown = [skill for skill in self.mix if skill not in SKILLS]
        if unknown:
            raise BadArgument(f"mix: got the skill {unknown[0]!r}, want skills out of {', '.join(SKILLS)}")
        shares = list(self.mix.values())
        if not all(np.isfinite(share) and share >= 0 for share in shares) or sum(shares) <= 0:
            raise BadArgument(f"mix: got shares {shares}, want numbers of at least 0 with a positive sum")
        available = sum(len(all_prompts(skill, TRAIN_SPLIT)) for skill, share in self.mix.items() if share > 0)
        if self.captions > available:
            raise BadArgument(f"captions: got {self.captions}, want at most {available}: the mix's skills have no more")
        if self.compression not in ("none", "zstd"):
            raise BadArgument(f"compression: got {self.compression!r}, want none or zstd")


def _shares(total: int, weights: dict[str, float], room: dict[str, int] | None = None) -> dict[str, int]:
    """Whole numbers of sum `total` in proportion to the weights, none above its `room`, which must suffice."""
    given = dict.fromkeys(weights, 0)
    for _ in range(total):
        open_ = [skill for skill in weights if weights[skill] > 0 and (room is None or given[skill] < room[skill])]
        # The one furthest behind its share; the first of equals, so that the result is unique.
        behind = min(open_, key=lambda skill: (given[skill] + 1) / weights[skill])
        given[behind] += 1
    return given


def _spread(prompts: Sequence[Prompt], count: int, rng: np.random.Generator) -> list[Prompt]:
    """`count` different prompts that cover their subjects (kind, color, count, negated word) as evenly as can be."""
    by_subject = defaultdict(list)
    for i in rng.permutation(len(prompts)):
        by_subject[(prompts[i].groups[0], prompts[i].absent)].append(prompts[i])
    rounds = range(max(map(len, by_subject.values()), default=0))
    return [of[i] for i in rounds for of in by_subject.values() if i < len(of)][:count]


def choose_captions(arguments: ShapesArguments) -> list[Prompt]:
    """The training captions' prompts, `arguments.captions` different ones; a skill with too few leaves its share."""
    rng = np.random.default_rng([arguments.seed, _CAPTIONS])
    pools = {skill: all_prompts(skill, TRAIN_SPLIT) for skill in SKILLS if arguments.mix.get(skill, 0) > 0}
    weights = {skill: arguments.mix[skill] for skill in pools}
    counts = _shares(arguments.captions, weights, {skill: len(pool) for skill, pool in pools.items()})
    return [prompt for skill, pool in pools.items() for prompt in _spread(pool, counts[skill], rng)]


def choose_evaluation(arguments: ShapesArguments, captions: Sequence[Prompt]) -> list[tuple[str, Prompt]]:
    """(split, prompt) of the evaluation: up to `arguments.prompts` for each split and each skill among the captions."""
    rng = np.random.default_rng([arguments.seed, _PROMPTS])
    chosen = []
    for split in SPLITS:
        for skill in SKILLS:
            own = [prompt for prompt in captions if prompt.skill == skill]
            pool = own if split == TRAIN_SPLIT else all_prompts(skill, split) if own else ()
            chosen += [(split, prompt) for prompt in _spread(pool, arguments.prompts, rng)]
    return chosen


def choose_samples(
    captions: Sequence[Prompt], count: int, mix: dict[str, float], rng: np.random.Generator, each: bool
) -> list[Prompt]:
    """The prompt of each of `count` pictures, shuffled: skills by the mix, a skill's captions about equally often.

    With `each`, every caption occurs at least once; count must then be at least their number.
    """
    by_skill = defaultdict(list)
    for i in rng.permutation(len(captions)):
        by_skill[captions[i].skill].append(captions[i])
    weights = {skill: mix[skill] for skill in SKILLS if skill in by_skill}
    numbers = _shares(count, weights)
    if each and any(numbers[skill] < len(of) for skill, of in by_skill.items()):
        rest = _shares(count - len(captions), weights)
        numbers = {skill: len(by_skill[skill]) + rest[skill] for skill in weights}
    chosen = [by_skill[skill][i % len(by_skill[skill])] for skill in weights for i in range(numbers[skill])]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def _write_shards(
    folder: Path, prompts: Sequence[Prompt], arguments: ShapesArguments, stream: int, tick: Callable[[], None]
) -> None:
    from streaming import MDSWriter  # imports torch, which those who only draw or score need not wait for

    compression = None if arguments.compression == "none" else arguments.compression
    with MDSWriter(
        out=str(folder), columns=COLUMNS, compression=compression, hashes=["sha256"], size_limit=_SHARD_BYTES
    ) as writer:
        for i, prompt in enumerate(prompts):
            scene = sample_scene(prompt, np.random.default_rng([arguments.seed, stream, i]))
            meta = {"skill": prompt.skill, "split": TRAIN_SPLIT, "scene": scene.to_json()}
            writer.write({"image": _png(render(scene, arguments.size)), "caption": prompt.caption, "meta": meta})
            tick()


def write_corpus(folder: Path, arguments: ShapesArguments, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Writes train/, val/, prompts.jsonl and, last, corpus.json into an existing empty folder.

    `tick` is called after each picture. Returns what corpus.json holds: {"format", "version", "arguments", "counts"}.
    """
    captions = choose_captions(arguments)
    evaluation = choose_evaluation(arguments, captions)
    rng = np.random.default_rng([arguments.seed, _PROMPTS, 1])
    lines = []
    for split, prompt in evaluation:
        scene = sample_scene(prompt, rng)
        record = {"caption": prompt.caption, "skill": prompt.skill, "split": split, "scene": scene.to_json()}
        lines.append(json.dumps(record) + "\n")
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")

    counts: dict[str, Any] = {"captions": dict(Counter(prompt.skill for prompt in captions))}
    for name, number, stream in (("train", arguments.samples, _TRAIN), ("val", arguments.val, _VAL)):
        order = np.random.default_rng([arguments.seed, stream])
        prompts = choose_samples(captions, number, arguments.mix, order, each=stream == _TRAIN)
        _write_shards(folder / name, prompts, arguments, stream, tick)
        of = Counter(prompt.skill for prompt in prompts)
        counts[name] = {skill: of[skill] for skill in SKILLS if of[skill]}
    counts["prompts"] = {
        split: dict(Counter(prompt.skill for s, prompt in evaluation if s == split))
        for split in SPLITS
        if any(s == split for s, _ in evaluation)
    }
    corpus = {"format": "shapes", "version": VERSION, "arguments": asdict(arguments), "counts": counts}
    (folder / "corpus.json").write_text(json.dumps(corpus, indent=2) + "\n", encoding="utf-8")
    return corpus


def read_prompts(folder: str | Path) -> list[tuple[str, Scene]]:
    """(split, scene) of every evaluation prompt of a corpus, in the file's order; the prompt is the scene's.

    Raises FileNotFoundError if the folder holds no prompts.jsonl.
    """
    with open(Path(folder) / "prompts.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [(record["split"], Scene.from_json(record["scene"])) for record in records]
