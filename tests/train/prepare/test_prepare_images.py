"""Pictures of every kind, decoded again and compared with what they should be; broken ones refused with the reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from train.prepare.images import UPRIGHT, ImageOptions, bucket_sizes, render
from train.prepare.rejects import Rejected

RNG = np.random.default_rng(0)
PNG = ImageOptions(sizes=((32, 32),), format="png", max_aspect=10)


def encoded(image: Image.Image, kind: str = "PNG", **how) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def pixels(data: bytes, options: ImageOptions = PNG) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(render(data, options).data)))


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(width: int, height: int) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return np.stack([255 * x, 255 * y, 127 + 60 * np.sin(5 * (x + y))], -1).astype(np.uint8)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + body + chunk(b"IEND", b"")


def reason(data: bytes, options: ImageOptions = PNG) -> str:
    with pytest.raises(Rejected) as caught:
        render(data, options)
    return caught.value.reason


def test_a_picture_of_the_right_size_is_kept_to_the_bit():
    image = noise(32, 32)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(image))), image)


def cover_reference(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Area average over the centred box with the target's aspect ratio, by exact integration of every pixel."""

    def weights(start, length, cells, source):
        edges = start + length * np.arange(cells + 1) / cells
        left, right = (
            np.maximum(edges[:-1, None], np.arange(source)),
            np.minimum(edges[1:, None], np.arange(source) + 1),
        )
        return np.maximum(0, right - left) * cells / length

    h, w = image.shape[:2]
    scale = min(w / width, h / height)
    rows = weights((h - height * scale) / 2, height * scale, height, h)
    columns = weights((w - width * scale) / 2, width * scale, width, w)
    return np.einsum("yh,xw,hwc->yxc", rows, columns, image.astype(np.float64), optimize=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(40, 400), st.integers(40, 400), st.sampled_from([(32, 32), (48, 24), (24, 40)]))
def test_resizing_covers_and_crops_at_the_centre(width, height, size):
    image = smooth(width, height)
    got = pixels(encoded(Image.fromarray(image)), ImageOptions(sizes=(size,), format="png", max_aspect=100))
    want = cover_reference(image, *size)
    assert got.shape == want.shape
    assert np.abs(got - want)[2:-2, 2:-2].max() < 4  # Lanczos against area: nearly the same on smooth pictures


def test_a_large_jpeg_is_read_small_and_looks_the_same():
    image = smooth(1600, 1200)
    got = pixels(encoded(Image.fromarray(image), "JPEG", quality=95))
    assert np.abs(got - cover_reference(image, 32, 32))[2:-2, 2:-2].max() < 6


@pytest.mark.parametrize("orientation", [1, *UPRIGHT])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind):
    stored = np.kron(np.array([[0, 85, 170], [255, 40, 120]], np.uint8), np.ones((32, 32), np.uint8))
    if orientation in (5, 6, 7, 8):
        upright = {5: stored.T, 6: np.rot90(stored, -1), 7: np.rot90(stored, 2).T, 8: np.rot90(stored)}[orientation]
    else:
        upright = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored).convert("RGB"), kind, exif=exif, quality=100)
    height, width = upright.shape
    picture = render(data, ImageOptions(sizes=((width, height), (height, width)), format="png"))
    assert (picture.size, picture.original) == ((width, height), (width, height))
    got = np.asarray(Image.open(io.BytesIO(picture.data)).convert("L")).astype(int)
    centres = (slice(16, None, 32), slice(16, None, 32))
    assert np.abs(got[centres] - upright[centres]).max() <= 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_in_front_of_a_good_picture_is_ignored():
    image = noise(32, 32)
    data = encoded(Image.fromarray(image), exif=b"Exif\0\0II*\0\xff\xff\xff\xffjunk")
    np.testing.assert_array_equal(pixels(data), image)


def test_16_bit_grey_is_scaled_not_clipped():
    values = RNG.integers(0, 65536, (32, 32))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    want = np.floor(values / 257 + 0.5)
    got = pixels(png(32, 32, 16, 0, rows))
    np.testing.assert_array_equal(got, np.repeat(want[..., None], 3, 2))


def test_16_bit_colour_is_scaled():
    values = RNG.integers(0, 65536, (32, 32, 3))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    assert np.abs(pixels(png(32, 32, 16, 2, rows)) - values / 257).max() <= 1


def test_transparent_pictures_lie_on_white():
    rgba = noise(32, 32, 4)
    alpha = rgba[..., 3:] / 255
    want = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(encoded(Image.fromarray(rgba))) - want).max() <= 1
    two = rgba[..., :2].astype(np.float64)
    grey = encoded(Image.fromarray(np.ascontiguousarray(rgba[..., :2])))
    want = two[..., :1] * two[..., 1:] / 255 + 255 - two[..., 1:]
    assert np.abs(pixels(grey) - want).max() <= 1
    keyed = encoded(Image.new("P", (32, 32), 0), transparency=0)  # a palette whose only colour is see-through
    assert (pixels(keyed) == 255).all()


def test_what_is_transparent_does_not_bleed_into_what_is_not():
    rgba = np.zeros((300, 300, 4), np.uint8)
    rgba[:, :149] = (200, 30, 60, 255)
    rgba[100:, 200:] = (0, 0, 255, 128)
    alpha = rgba[..., 3:] / 255
    want = cover_reference(rgba[..., :3] * alpha + 255 * (1 - alpha), 32, 32)
    got = pixels(encoded(Image.fromarray(rgba)))
    away = np.ones((32, 32), bool)  # Lanczos rings beside an edge
    away[:, 13:25] = away[8:14, 13:] = False
    assert np.abs(got - want)[away].max() <= 2


def test_palette_grey_and_bilevel():
    image = Image.fromarray(smooth(32, 32)).quantize(16)
    np.testing.assert_array_equal(pixels(encoded(image)), np.asarray(image.convert("RGB")))
    grey = noise(32, 32)[..., 0]
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(grey))), np.repeat(grey[..., None], 3, 2))
    bits = Image.fromarray(grey).convert("1")
    np.testing.assert_array_equal(pixels(encoded(bits)), np.asarray(bits.convert("RGB")))


def test_cmyk_becomes_rgb():
    cmyk = np.full((64, 64, 4), [0, 255, 255, 0], np.uint8)  # red
    got = pixels(encoded(Image.fromarray(cmyk.astype(np.uint8), "CMYK"), "JPEG", quality=100))
    assert np.abs(got.astype(int) - [255, 0, 0]).max() <= 4


def test_a_profile_is_taken_to_srgb():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    image = noise(32, 32)
    same = pixels(encoded(Image.fromarray(image), icc_profile=srgb.tobytes()))
    np.testing.assert_array_equal(same, image)
    swapped = swap_red_and_blue(srgb.tobytes())
    got = pixels(encoded(Image.fromarray(image), icc_profile=swapped))
    assert np.abs(got.astype(int) - image[..., ::-1]).max() <= 2


def swap_red_and_blue(profile: bytes) -> bytes:
    """An RGB matrix profile with the primaries of red and blue exchanged, under another name."""
    count = struct.unpack(">I", profile[128:132])[0]
    out = bytearray(profile)
    for i in range(count):
        at = 132 + 12 * i
        name, offset, size = profile[at : at + 4], *struct.unpack(">II", profile[at + 4 : at + 12])
        if name in (b"rXYZ", b"bXYZ"):
            out[at : at + 4] = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}[name]
        if name == b"desc":
            out[offset : offset + size] = profile[offset : offset + size].replace(
                "sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be")
            )
    return bytes(out)


def test_a_broken_profile_is_ignored():
    image = noise(32, 32)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(image), icc_profile=b"no profile" * 20)), image)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@settings(max_examples=20, deadline=None)
@given(part=st.floats(0, 0.995))
def test_a_cut_file_is_never_a_picture(kind, part):
    data = encoded(Image.fromarray(noise(64, 64)), kind, quality=90)
    assert reason(data[: int(part * len(data))]) in (
        "image_broken",
        "image_empty",
        "image_format",
        "image_small",
        "image_pixels",
    )


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x20\x00\x00\x00WEBPVP8X"]),
)
def test_junk_is_refused(junk, front):
    assert reason(front + junk).startswith("image_")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "EPS"])
def test_other_formats_are_refused(kind):
    assert reason(encoded(Image.fromarray(noise(32, 32)), kind)) == "image_format"


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animations_are_refused(kind):
    frames = [Image.fromarray(noise(32, 32)) for _ in range(2)]
    assert reason(encoded(frames[0], kind, save_all=True, append_images=frames[1:])) == "image_animated"


def test_a_cameras_preview_behind_a_jpeg_is_no_animation():
    frames = [Image.fromarray(smooth(64, 64)), Image.fromarray(noise(64, 64))]
    got = pixels(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=95))
    assert np.abs(got - cover_reference(smooth(64, 64), 32, 32))[2:-2, 2:-2].max() < 8


def test_limits_of_size_and_aspect():
    data = encoded(Image.fromarray(noise(60, 30)))
    sizes = ((16, 16),)
    assert reason(data, ImageOptions(sizes, min_side=31)) == "image_small"
    assert reason(data, ImageOptions(sizes, max_aspect=1.9)) == "image_aspect"
    assert reason(data, ImageOptions(sizes, max_pixels=1799)) == "image_pixels"
    assert render(data, ImageOptions(sizes, min_side=30, max_aspect=2, max_pixels=1800)).original == (60, 30)


def huge_webp(width: int, height: int) -> bytes:
    body = (
        b"VP8X"
        + struct.pack("<I", 10)
        + bytes(4)
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize(
    "data",
    [
        png(20_000, 20_000, 8, 2, b""),
        png(2**31 - 1, 2**31 - 1, 8, 2, b""),
        huge_webp(16383, 16383),
        encoded(Image.new("L", (16, 16)), "JPEG").replace(
            b"\xff\xc0\x00\x0b\x08\x00\x10\x00\x10", b"\xff\xc0\x00\x0b\x08\x4e\x20\x4e\x20"
        ),
    ],
)
def test_too_many_pixels_are_refused_by_the_header(data):
    assert reason(data) == "image_pixels"


def test_a_zlib_bomb_in_a_text_chunk_is_refused():
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9))
    assert reason(png(32, 32, 8, 2, bytes(32 * 97), bomb)) == "image_broken"


def test_buckets_have_the_area_and_the_step():
    for size, step in ((256, 64), (512, 64), (1024, 32)):
        sizes = bucket_sizes(size, (1, 3 / 4, 4 / 3, 1 / 2, 2), step)
        assert sizes[0] == (size, size)
        assert sizes[1] == sizes[2][::-1]
        for width, height in sizes:
            assert width % step == height % step == 0
            assert abs(width * height / size**2 - 1) < 0.25


def test_the_nearest_bucket_is_taken():
    options = ImageOptions(sizes=((64, 64), (48, 80), (80, 48)), format="png")
    shapes = {(100, 100): (64, 64), (100, 160): (48, 80), (300, 200): (80, 48), (110, 100): (64, 64)}
    for (width, height), size in shapes.items():
        assert render(encoded(Image.fromarray(noise(width, height))), options).size == size


@pytest.mark.parametrize(("kind", "name"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_the_format_and_quality_are_used(kind, name):
    image = smooth(32, 32)
    data = encoded(Image.fromarray(image))
    good, bad = (render(data, ImageOptions(((32, 32),), kind, quality)).data for quality in (95, 10))
    assert Image.open(io.BytesIO(good)).format == name
    assert len(bad) < len(good) or kind == "png"
    assert np.abs(np.asarray(Image.open(io.BytesIO(good)).convert("RGB")).astype(int) - image).mean() < 3
