"""The subcommand `moments`: a column more with what the VAE makes of each image, so that training need not run it.

`moments` [2 channels, h, w] fp16 is the posterior's mean and log-variance, before shift and scale: training draws a new
latent from it every epoch. The encoder's fingerprint goes into each index.json, and training refuses another VAE.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.prepare.rewrite import Added, BrokenShard, Outcome, Sample, Tick, find_splits, rewrite
from train.shapes.corpus import BadArgument

if TYPE_CHECKING:
    from sr_model.codec import VaeCodec

VAE = "stabilityai/stable-diffusion-3-medium-diffusers"
COLUMN = "moments"
DTYPES = ("fp32", "bf16", "fp16")


def _pixels(data: bytes, where: str) -> np.ndarray:
    """An encoded image as uint8 [3, H, W]. Raises: BrokenShard."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError) as error:
        raise BrokenShard(f"{where}: its image cannot be decoded: {error}") from None


class Encoder:
    """The VAE over a shard's images, `batch_size` at a time."""

    def __init__(self, codec: VaeCodec, batch_size: int) -> None:
        self.codec, self.batch_size = codec, batch_size

    def __call__(self, place: str, samples: list[Sample], tick: Tick) -> Outcome:
        """rewrite.Added.compute. Raises: BrokenShard where an image cannot be used, or its moments leave fp16."""
        import torch

        values: list[np.ndarray] = []
        batch: list[np.ndarray] = []

        def flush() -> None:
            images = torch.from_numpy(np.stack(batch)).to(self.codec.vae.device).float() / 127.5 - 1
            encoded = self.codec.moments(images).to("cpu", torch.float16).numpy()
            if not np.isfinite(encoded).all():
                raise BrokenShard(f"{place}: moments are not finite in fp16; try --dtype fp32")
            values.extend(encoded)
            tick(len(batch))
            batch.clear()

        for at, sample in enumerate(samples):
            pixels = _pixels(sample["image"], f"{place}, sample {at}")
            if pixels.shape[1] % self.codec.factor or pixels.shape[2] % self.codec.factor:
                raise BrokenShard(
                    f"{place}, sample {at}: wanted sides that are multiples of {self.codec.factor}, "
                    f"got {pixels.shape[2]}x{pixels.shape[1]}"
                )
            if batch and (len(batch) == self.batch_size or batch[0].shape != pixels.shape):
                flush()
            batch.append(pixels)
        if batch:
            flush()
        return Outcome(values)


def prepare_moments(
    source: str | Path,
    out: str | Path,
    *,
    vae: str = VAE,
    batch_size: int = 32,
    device: str | None = None,
    dtype: str = "fp32",
    drop_image: bool = False,
    compression: str = "same",
    progress: bool = True,
) -> dict[str, Any]:
    """Writes `source` into `out` with the column `moments`, and without `image` if `drop_image`.

    vae: a Hugging Face name or folder of a diffusers AutoencoderKL. device: None takes a GPU if there is one.
    Returns the report (rewrite.rewrite).

    Raises: BadArgument; BrokenShard; OSError.
    """
    if batch_size < 1:
        raise BadArgument(f"batch-size: wanted 1 or more, got {batch_size}")
    if dtype not in DTYPES:
        raise BadArgument(f"dtype: wanted one of {', '.join(DTYPES)}, got {dtype!r}")
    for name, index in find_splits(Path(source)).items():
        for shard in index["shards"][:1]:
            if "image" not in shard["column_names"]:
                raise BadArgument(
                    f"source: wanted a column image, {source}/{name} has {', '.join(shard['column_names'])}"
                )
    import torch

    from sr_model.codec import VaeCodec

    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise BadArgument(
            f"device: wanted a device torch can use, got {device!r}: {str(error).splitlines()[0]}"
        ) from None
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    try:
        codec = VaeCodec.from_pretrained(vae, where, precision)
    except OSError as error:
        raise BadArgument(f"vae: wanted a diffusers AutoencoderKL, got {vae!r}: {str(error).splitlines()[0]}") from None
    about = {"vae": vae, "encoder": codec.fingerprint()}
    added = Added(
        COLUMN, "ndarray:float16", Encoder(codec, batch_size), drop="image" if drop_image else None, metadata=about
    )
    asked = {"encoder": about["encoder"], "dtype": dtype, "drop_image": drop_image}
    report = rewrite(source, out, added, asked, compression=compression, progress=progress)
    print(f"moments: {report['samples']} samples in {out}", file=sys.stderr)
    return report


def add_moments(commands: Any) -> None:
    """The subcommand's flags."""
    parser = commands.add_parser(
        "moments",
        help="a column with the VAE's posterior, so that training need not run its encoder",
        description="Writes a prepared folder into a new one with the column moments (mean and log-variance of the"
        " VAE's posterior, fp16). Training then draws its latents from them, new ones every epoch, and refuses"
        " another VAE. The same command continues an interrupted one.",
        epilog="example: python -m train.prepare moments --source data/laion-256 --out data/laion-moments --drop-image",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    required = {"required": True, "metavar": "DIR", "default": argparse.SUPPRESS}
    add("--source", help="a prepared folder: train/ and val/", **required)
    add("--out", help="folder to write; new, empty or begun by this command", **required)
    add("--vae", default=VAE, metavar="NAME|DIR", help="a diffusers AutoencoderKL, or a pipeline that has one")
    add("--batch-size", type=int, default=32, metavar="N", help="images encoded at a time")
    add("--device", default=argparse.SUPPRESS, metavar="NAME", help="such as cuda:1; a GPU if there is one")
    add("--dtype", default="fp32", choices=DTYPES, help="of the VAE; what it gives is stored in fp16")
    add("--drop-image", action="store_true", help="leave the images out of the new shards")
    add("--compression", default="same", choices=("same", "none", "zstd"), help="of the new shards")
    parser.set_defaults(prepare=prepare_moments)
