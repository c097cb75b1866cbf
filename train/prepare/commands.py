"""The subcommands `jsonl`, `webdataset` and `parquet`: their flags, checked before anything is read."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from train.prepare import jsonl, parquet, webdataset
from train.prepare.captions import CaptionOptions
from train.prepare.convert import prepare
from train.prepare.images import ImageOptions, bucket_sizes
from train.prepare.sources import Source, expand
from train.prepare.units import Job
from train.shapes.corpus import BadArgument

NOT_COMPARED = ("out", "workers", "progress", "input")  # a restart may change these; inputs are compared by file
COMMON = """
What is written: OUT/train and OUT/val, MDS shards with the columns image (upright, 8-bit sRGB, resized to cover --size
and cropped at the centre), caption, one more for each further caption, meta (source, key, original size, url); with
--buckets a folder train/WxH and val/WxH for each size. Samples that are left out are counted by reason in
OUT/report.json and listed in OUT/quarantine.jsonl.

Left out: pictures that are not JPEG, PNG or WebP, broken or cut off, animated, too large, too small or too long, or
changed between the two passes; captions that are missing, empty, not UTF-8 or too short; exact copies of a picture (the
first copy whose captions can be used stays). Transparent pictures are laid on white, 16 bits are scaled to 8, CMYK and
other profiles become sRGB.
A file that breaks off is kept as far as it can be read, and named.

The source is read twice: a first pass counts rows and hashes pictures (with --duplicates keep it reads no picture).
The result does not depend on --workers. Stopped in any way, the same command continues; finished, it says so. A run
that keeps no sample ends with exit code 1.
"""


def _captions(text: list[str]) -> tuple[tuple[str, str], ...]:
    """(column, field) from FIELD or COLUMN=FIELD; the first is the column `caption`. Raises: BadArgument."""
    pairs: list[tuple[str, str]] = []
    for i, item in enumerate(text):
        column, _, field = item.rpartition("=")
        column = "caption" if i == 0 and not column else column or field
        if not field or not column.isidentifier() or (column == "caption") != (i == 0):
            raise BadArgument(f"captions: wanted FIELD or COLUMN=FIELD, the first one alone for caption, got {item!r}")
        if column in ("image", "meta") or column in dict(pairs):
            raise BadArgument(f"captions: the column {column!r} is taken; COLUMN=FIELD gives another name")
        pairs.append((column, field))
    return tuple(pairs)


def _sizes(text: str | None, size: int, step: int) -> tuple[tuple[int, int], ...]:
    """(width, height) of the buckets, of the one size where there are none. Raises: BadArgument."""
    if text is None:
        return ((size, size),)
    aspects = []
    for item in text.split(","):
        try:
            if item == "square":
                aspects.append(1.0)
            elif text.isdigit():  # evenly from 1:2 to 2:1
                count = int(text)
                aspects = [2 ** (2 * i / (count - 1) - 1) for i in range(count)] if count > 1 else [1.0][:count]
            else:
                width, height = map(float, item.split(":"))
                aspects.append(width / height)
        except (ValueError, ZeroDivisionError):
            raise BadArgument(f"buckets: wanted a number, or square,3:4,4:3,..., got {text!r}") from None
    if not aspects or not all(0.1 <= a <= 10 for a in aspects):
        raise BadArgument(f"buckets: wanted aspect ratios from 1:10 to 10:1, got {text!r}")
    if step > size:
        raise BadArgument(f"bucket-step: wanted at most --size, which is {size}, got {step}")
    return bucket_sizes(size, aspects, step)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadArgument(f"{name}: wanted a number from {low:g} to {high:g}, got {value:g}")


def _job(source: Source, columns: tuple[tuple[str, str], ...], o: dict[str, Any]) -> Job:
    """The work that the flags ask for. Raises: BadArgument."""
    _check("size", o["size"], 8, 8192)
    _check("bucket-step", o["bucket_step"], 1, 8192)
    _check("quality", o["quality"], 1, 100)
    _check("shard-mb", o["shard_mb"], 1, 2048)
    _check("workers", o["workers"], 1, 1024)
    _check("max-aspect", o["max_aspect"], 1, 1e6)
    _check("max-pixels", o["max_pixels"], 1, 1e9)
    _check("max-file-mb", o["max_file_mb"], 1, 4096)
    _check("min-caption", o["min_caption"], 1, 1e9)
    _check("max-caption", o["max_caption"], o["min_caption"], 1e6)
    _check("val", o["val"], 0, 1e7)
    if o["val"] >= 1 and o["val"] != int(o["val"]):
        raise BadArgument(f"val: wanted a share below 1 or a whole number, got {o['val']:g}")
    if o["min_side"] is not None:
        _check("min-side", o["min_side"], 0, 1e6)
    images = ImageOptions(
        sizes=_sizes(o["buckets"], o["size"], o["bucket_step"]),
        format=o["format"],
        quality=o["quality"],
        min_side=o["size"] if o["min_side"] is None else o["min_side"],
        max_aspect=o["max_aspect"],
        max_pixels=o["max_pixels"],
    )
    return Job(
        source=source,
        columns=columns,
        captions=CaptionOptions(o["min_caption"], o["max_caption"], o["long_captions"]),
        images=images,
        buckets=o["buckets"] is not None,
        duplicates=o["duplicates"],
        compression=None if o["compression"] == "none" else o["compression"],
        shard_bytes=o["shard_mb"] << 20,
        val_rows=int(o["val"]) if o["val"] >= 1 else 0,
    )


def _prepare(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    columns = _captions(options["captions"])
    fields = tuple(dict.fromkeys(field for _, field in columns))
    suffixes = {"jsonl": jsonl.SUFFIXES, "webdataset": webdataset.SUFFIXES, "parquet": parquet.SUFFIXES}[kind]
    files = expand("input", options["input"], suffixes)
    max_bytes = options["max_file_mb"] << 20
    source: Source
    if kind == "jsonl":
        root = options["root"]
        if root is not None and not os.path.isdir(root):
            raise BadArgument(f"root: wanted a folder, found none at {root}")
        source = jsonl.Jsonl(files, root, options["image"], options["key"], fields, max_bytes)
    elif kind == "webdataset":
        source = webdataset.Webdataset(files, fields, max_bytes)
    else:
        source = parquet.Parquet(files, options["image"], options["key"], fields, max_bytes)
    job = _job(source, columns, options)
    arguments = {"command": kind, **{k: v for k, v in options.items() if k not in NOT_COMPARED}}
    return prepare(job, Path(options["out"]), arguments, options["val"], options["workers"], options["progress"])


def prepare_jsonl(**options: Any) -> dict[str, Any]:
    """The subcommand `jsonl`; options are its flags. Returns the report. Raises: as convert.prepare does."""
    return _prepare("jsonl", options)


def prepare_webdataset(**options: Any) -> dict[str, Any]:
    """The subcommand `webdataset`; options are its flags. Returns the report. Raises: as convert.prepare does."""
    return _prepare("webdataset", options)


def prepare_parquet(**options: Any) -> dict[str, Any]:
    """The subcommand `parquet`; options are its flags. Returns the report. Raises: as convert.prepare does."""
    return _prepare("parquet", options)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults, and descriptions as they are written."""


def _command(commands: Any, name: str, help: str, about: str, example: str, inputs: str, captions: list[str]) -> Any:
    """A subcommand with the flags that all three have."""
    parser = commands.add_parser(
        name, help=help, description=f"{about}\n{COMMON}", epilog=f"example:\n  {example}", formatter_class=_Help
    )
    add = parser.add_argument
    add("input", nargs="+", metavar="INPUT", help=inputs)
    add("--out", required=True, metavar="OUT", default=argparse.SUPPRESS, help="folder to write")
    add("--captions", nargs="+", default=captions, metavar="FIELD", help="caption fields; the first becomes the column"
        " caption, further ones columns of their own name, or of another with COLUMN=FIELD; a sample has all or is"
        " left out")  # fmt: skip
    add("--size", type=int, default=256, metavar="PIXELS", help="side of the pictures; with buckets, of their area")
    add("--buckets", default=None, metavar="N|LIST", help="aspect buckets: a number, evenly from 1:2 to 2:1, or a list"
        " of width:height such as square,3:4,4:3")  # fmt: skip
    add("--bucket-step", type=int, default=64, metavar="PIXELS", help="sides of buckets are multiples of this")
    add("--format", choices=("jpeg", "webp", "png"), default="jpeg", help="how pictures are stored")
    add("--quality", type=int, default=95, metavar="N", help="of JPEG (without chroma subsampling) and WebP")
    add("--val", type=float, default=1000, metavar="N", help="validation samples, drawn by a hash of the file's"
        " name and the key: a share below 1, or about this many, at most a tenth of all rows")  # fmt: skip
    add("--min-side", type=int, default=None, metavar="PIXELS", help="leave out pictures whose shorter side is less;"
        " None is --size, so that nothing is enlarged; 0 takes all")  # fmt: skip
    add("--max-aspect", type=float, default=3.0, metavar="RATIO", help="leave out pictures longer than this")
    add("--max-pixels", type=int, default=64_000_000, metavar="N", help="leave out pictures of more, undecoded; a"
        " worker needs up to 8 bytes a pixel, 17 for WebP")  # fmt: skip
    add("--max-file-mb", type=int, default=64, metavar="MB", help="leave out image files larger than this, unread")
    add("--min-caption", type=int, default=1, metavar="N", help="leave out samples with a caption of fewer characters")
    add("--max-caption", type=int, default=4000, metavar="N", help="longest caption, in characters")
    add("--long-captions", choices=("cut", "drop"), default="cut", help="longer captions: cut after the last word"
        " that fits, and count them, or leave the sample out")  # fmt: skip
    add("--duplicates", choices=("drop", "keep"), default="drop", help="exact copies of an image file")
    add("--compression", choices=("zstd", "none"), default="zstd", help="of the shards")
    add("--shard-mb", type=int, default=64, metavar="MB", help="size of a shard before compression; a worker holds"
        " about three for each folder it writes")  # fmt: skip
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    add("--no-progress", dest="progress", action="store_false", default=argparse.SUPPRESS, help="no progress bar")
    parser.set_defaults(progress=True)
    return parser


def add_jsonl(commands: Any) -> None:
    """The subcommand's flags."""
    parser = _command(
        commands,
        "jsonl",
        "JSON lines with image paths and captions",
        "Reads JSON lines, each an object with an image path and captions: *.jsonl, also .gz and .zst.",
        "python -m train.prepare jsonl photos.jsonl --captions caption dense=long_caption --size 512 --out data/photos",
        "files, or folders of them",
        ["caption"],
    )
    parser.add_argument("--image", default="image", metavar="FIELD", help="field of the image's path")
    parser.add_argument("--root", default=None, metavar="DIR", help="folder that image paths are relative to and must"
                        " stay in; None is the folder of the file")  # fmt: skip
    parser.add_argument("--key", default=None, metavar="FIELD", help="field that names a sample; None: its image path")
    parser.set_defaults(prepare=prepare_jsonl)


def add_webdataset(commands: Any) -> None:
    """The subcommand's flags."""
    parser = _command(
        commands,
        "webdataset",
        "tars of images and captions, as img2dataset writes them",
        "Reads local tars with KEY.jpg, .png or .webp, KEY.txt and KEY.json, and TAR.parquet beside them where it is.\n"
        "A caption field is a member's extension (txt), else a key of KEY.json, else a column of TAR.parquet.",
        "python -m train.prepare webdataset /data/laion/*.tar --size 256 --buckets 5 --out data/laion-256",
        "tars, or folders of them",
        ["txt"],
    )
    parser.set_defaults(prepare=prepare_webdataset)


def add_parquet(commands: Any) -> None:
    """The subcommand's flags."""
    parser = _command(
        commands,
        "parquet",
        "Parquet files with images inside",
        "Reads Parquet files with a column of image files (bytes, or Hugging Face's struct of bytes and path) and\n"
        "columns of captions. Needs pyarrow: pip install 'semantic-routing[prepare]'.",
        "python -m train.prepare parquet hub/data --captions text --image image --size 512 --out data/hub-512",
        "files, or folders of them",
        ["caption"],
    )
    parser.add_argument("--image", default="image", metavar="COLUMN", help="column of the image files")
    parser.add_argument("--key", default=None, metavar="COLUMN", help="column that names a sample; None: file:row")
    parser.set_defaults(prepare=prepare_parquet)
