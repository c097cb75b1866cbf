"""The subcommand `shapes`: the built-in corpus of coloured shapes as MDS shards.

It is written into a temporary folder beside DIR and renamed into place, so DIR is complete or not there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train.shapes.corpus import DEFAULT_MIX, VERSION, BadArgument, ShapesArguments, write_corpus
from train.shapes.scene import SKILLS


def _existing(out: Path, arguments: ShapesArguments) -> dict[str, Any] | None:
    """The corpus.json of a corpus of the same arguments in `out`; None if `out` is free to be written.

    Raises BadArgument if something else is there.
    """
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise BadArgument(f"out: {path} is a file, want a folder")
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        corpus = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
        found = {"format": corpus["format"], "version": corpus["version"], **corpus["arguments"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise BadArgument(f"out: {out} holds files but no corpus, want a new or empty folder") from None
    wanted = {"format": "shapes", "version": VERSION, **asdict(arguments)}
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise BadArgument(
                f"out: {out} holds a corpus with {name} {found.get(name)}, not {wanted.get(name)};"
                " want another folder, or the old one deleted"
            )
    return corpus


def prepare_shapes(
    out: str | Path,
    *,
    samples: int = 6000,
    captions: int = 600,
    size: int = 32,
    seed: int = 0,
    val: int = 256,
    prompts: int = 12,
    mix: dict[str, float] | None = None,
    compression: str = "none",
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the shapes corpus into the folder `out`, or reuses the one that is there if its arguments are the same.

    samples: training pictures; captions: distinct captions among them; size: side in pixels, >= 32; val: validation
    pictures; prompts: evaluation prompts for each skill and split; mix: share of the pictures by skill, None for the
    default; compression: "none" or "zstd". The folder gets train/ and val/ (MDS shards with columns image, an encoded
    PNG file; caption; meta), prompts.jsonl and corpus.json, whose contents are returned. One line on stderr says
    which was done, and a bar shows progress on a terminal.

    Raises BadArgument, a ValueError, if an argument cannot be used or `out` holds something else; OSError if the disk
    cannot be written.
    """
    arguments = ShapesArguments(
        samples, captions, size, seed, val, prompts, dict(DEFAULT_MIX if mix is None else mix), compression
    )
    out = Path(out)
    corpus = _existing(out, arguments)
    if corpus is not None:
        print(f"shapes: reusing the corpus in {out} ({samples} samples, {captions} captions)", file=sys.stderr)
        return corpus
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        # None: no bar where stderr is not a terminal.
        with tqdm(total=samples + val, desc="shapes", unit="img", disable=None if progress else True) as bar:
            corpus = write_corpus(partial, arguments, bar.update)
        try:
            os.replace(partial, out)
        except OSError:
            # Another process may have put the same corpus there meanwhile; anything else is the error it was.
            other = _existing(out, arguments)
            if other is None:
                raise
            return other
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"shapes: wrote {samples} + {val} samples with {captions} captions to {out}", file=sys.stderr)
    return corpus


def _mix(text: str) -> dict[str, float]:
    try:
        return {skill.strip(): float(share) for skill, share in (item.split("=") for item in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, want skill=share,skill=share,...") from None


def add_shapes(commands: Any) -> None:
    """The subcommand's flags."""
    shapes = commands.add_parser(
        "shapes",
        help="the built-in corpus of coloured shapes",
        description="Writes captioned pictures of coloured shapes, drawn from known scenes so that generated pictures"
        " can be scored exactly: DIR/train and DIR/val (MDS shards), DIR/prompts.jsonl (evaluation prompts,"
        " held-out ones included) and DIR/corpus.json. A DIR that holds the same corpus is reused.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = ShapesArguments()
    add = shapes.add_argument
    add("--out", required=True, metavar="DIR", default=argparse.SUPPRESS, help="folder to write; new, empty or reused")
    add("--samples", type=int, default=default.samples, metavar="N", help="training pictures")
    add("--captions", type=int, default=default.captions, metavar="N", help="distinct captions among them")
    add("--size", type=int, default=default.size, metavar="PIXELS", help="side of the pictures, at least 32")
    add("--seed", type=int, default=default.seed, metavar="N", help="the same seed gives the same bytes")
    add("--val", type=int, default=default.val, metavar="N", help="validation pictures: new scenes, training captions")
    add("--prompts", type=int, default=default.prompts, metavar="N", help="evaluation prompts per skill and split")
    add(
        "--mix",
        type=_mix,
        default=",".join(f"{skill}={share}" for skill, share in DEFAULT_MIX.items()),
        metavar="SKILL=SHARE,...",
        help=f"share of the pictures by skill, out of {', '.join(SKILLS)}; skills not named get none",
    )
    add("--compression", default=default.compression, metavar="none|zstd", help="compression of the shards")
    shapes.set_defaults(prepare=prepare_shapes)
