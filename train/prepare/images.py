"""An image file of unknown quality to an encoded picture of the training size, or a reason why not.

JPEG, PNG and WebP only, told by their first bytes. Sides are checked before anything is decoded. The picture is upright
(EXIF), 8-bit sRGB; transparency lies on white; more than 8 bits are scaled, not clipped; animations are refused.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from train.prepare.rejects import Rejected

ORIENTATION = 0x0112
# How an upright picture comes out of the stored one, by EXIF orientation
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
GAP = 3.0  # a picture is box-reduced to no less than this many times the target before the Lanczos filter


@dataclass(frozen=True)
class ImageOptions:
    """What pictures become and which are taken.

    Args:
        sizes: (width, height) to choose from; the nearest in aspect ratio is taken.
        format: jpeg, webp or png.
        quality: 1 to 100, of JPEG and WebP.
        min_side: shorter side that a picture must have, in pixels.
        max_aspect: longer side over shorter that it may have.
        max_pixels: pixels it may have; larger ones are not decoded.
    """

    sizes: tuple[tuple[int, int], ...]
    format: str = "jpeg"
    quality: int = 95
    min_side: int = 0
    max_aspect: float = 3.0
    max_pixels: int = 64_000_000


@dataclass(frozen=True)
class Picture:
    """An encoded picture: `data`, its `size` (width, height), and the `original` size, upright."""

    data: bytes
    size: tuple[int, int]
    original: tuple[int, int]


def bucket_sizes(size: int, aspects: Sequence[float], step: int) -> tuple[tuple[int, int], ...]:
    """(width, height) for each aspect ratio width / height: multiples of `step`, the area about size^2; no doubles."""
    sizes = []
    for aspect in aspects:
        width, height = (max(1, round(size * math.sqrt(a) / step)) * step for a in (aspect, 1 / aspect))
        if (width, height) not in sizes:
            sizes.append((width, height))
    return tuple(sizes)


def sniff(data: bytes) -> str:
    """Pillow's name of the format. Raises: Rejected where it is none of ours."""
    if not data:
        raise Rejected("image_empty", "0 bytes")
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    raise Rejected("image_format", f"wanted JPEG, PNG or WebP, the file begins {data[:8]!r}")


def header_size(data: bytes, kind: str) -> tuple[int, int] | None:
    """(width, height) as PNG or WebP state them; None for JPEG, whose header Pillow reads without allocating.

    Pillow's WebP reader makes the whole canvas on opening, so its sides must be known before.
    """
    if kind == "PNG":
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if kind == "WEBP":
        if data[12:16] == b"VP8X":
            return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        if data[12:16] == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def _check_sides(width: int, height: int, options: ImageOptions) -> None:
    if width * height > options.max_pixels:
        raise Rejected("image_pixels", f"{width}x{height}, wanted at most {options.max_pixels} pixels")
    if min(width, height) < max(1, options.min_side):
        raise Rejected("image_small", f"{width}x{height}, wanted sides of at least {options.min_side}")
    if max(width, height) > options.max_aspect * min(width, height):
        raise Rejected("image_aspect", f"{width}x{height}, wanted an aspect ratio of at most {options.max_aspect:g}")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits, v / 257 rounded, some rows at a time. Pillow's own conversion clips at 255."""
    out = np.empty((image.height, image.width), np.uint8)
    for top in range(0, image.height, 256):
        rows = np.asarray(image.crop((0, top, image.width, min(top + 256, image.height)))).astype(np.uint32)
        out[top : top + 256] = (rows + 128) // 257
    return Image.fromarray(out)


def _resizable(image: Image.Image) -> Image.Image:
    """The decoded picture as L, RGB, CMYK, or RGBa, colours multiplied by their alpha."""
    if image.mode in ("I;16", "I;16B"):
        return _eight_bits(image)
    if image.has_transparency_data:
        return (image if image.mode == "RGBA" else image.convert("RGBA")).convert("RGBa")
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    if image.mode in ("1", "P", "YCbCr"):
        return image.convert("RGB")
    raise Rejected("image_mode", f"pixels of mode {image.mode}")


def _on_white(image: Image.Image) -> Image.Image:
    """A picture in RGBa as RGB, white behind it."""
    values = np.asarray(image).astype(np.uint16)
    return Image.fromarray(np.minimum(values[..., :3] + 255 - values[..., 3:], 255).astype(np.uint8))


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """A transform from an ICC profile, None where it is sRGB already or cannot be used."""
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).startswith("sRGB"):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _cover(width: int, height: int, target: tuple[int, int]) -> tuple[float, float, float, float]:
    """The centred box of a picture that has the target's aspect ratio."""
    scale = min(width / target[0], height / target[1])
    w, h = target[0] * scale, target[1] * scale
    left, top = max(0.0, (width - w) / 2), max(0.0, (height - h) / 2)
    return left, top, min(width, left + w), min(height, top + h)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (as stored) where EXIF says none or cannot be read."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF in front of a good picture
        return 1


def _encode(image: Image.Image, options: ImageOptions) -> bytes:
    file = io.BytesIO()
    if options.format == "jpeg":
        image.save(file, "JPEG", quality=options.quality, subsampling=0)
    elif options.format == "webp":
        image.save(file, "WEBP", quality=options.quality)
    else:
        image.save(file, "PNG")
    return file.getvalue()


def fit(image: Image.Image, options: ImageOptions) -> tuple[Image.Image, tuple[int, int]]:
    """An opened, not yet decoded picture to (RGB of one of the sizes, its original upright size).

    Raises: Rejected where the options leave it out; whatever Pillow raises where it cannot be decoded.
    """
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a camera's JPEG with a preview behind it
        raise Rejected("image_animated", f"{getattr(image, 'n_frames', 2)} frames")
    _check_sides(*image.size, options)
    turn = UPRIGHT.get(_orientation(image))
    swapped = turn in (
        Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90
    )  # fmt: skip
    stored = image.size
    original = stored[::-1] if swapped else stored
    aspect = math.log(original[0] / original[1])
    size = min(options.sizes, key=lambda s: abs(math.log(s[0] / s[1]) - aspect))
    target = size[::-1] if swapped else size
    profile = image.info.get("icc_profile")
    if image.format in ("JPEG", "MPO"):
        image.draft(None, (round(target[0] * GAP), round(target[1] * GAP)))
    image.load()
    flat = _resizable(image)
    # A picture of the target's size comes out as it is.
    small = flat.resize(target, Image.Resampling.LANCZOS, box=_cover(*flat.size, target), reducing_gap=GAP)
    if small.mode == "RGBa":
        small = _on_white(small)
    transform = _to_srgb(profile, small.mode) if profile else None
    if transform is not None:
        small = ImageCms.applyTransform(small, transform) or small
    small = small.convert("RGB")
    return (small if turn is None else small.transpose(turn)), original


def render(data: bytes, options: ImageOptions) -> Picture:
    """An image file's bytes to a Picture. Memory: the file, and for each of at most `max_pixels` up to 8 bytes (JPEG,
    PNG) or 17 (WebP); hardly any for a JPEG that is not progressive.

    Raises: Rejected with the reason.
    """
    kind = sniff(data)
    stated = header_size(data, kind)
    if stated is not None and 0 not in stated and stated[0] * stated[1] > options.max_pixels:
        raise Rejected("image_pixels", f"{stated[0]}x{stated[1]}, wanted at most {options.max_pixels} pixels")
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            small, original = fit(image, options)
    except Rejected:
        raise
    except Image.DecompressionBombError:
        raise Rejected("image_pixels", f"wanted at most {options.max_pixels} pixels") from None
    except Exception as error:  # Pillow's readers raise nearly anything on broken files
        raise Rejected("image_broken", f"{kind}: {type(error).__name__}: {error}") from None
    return Picture(_encode(small, options), small.size, original)
