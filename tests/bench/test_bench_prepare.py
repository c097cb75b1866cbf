"""The preparing benchmark: its pictures carry their numbers, its tars hold what it says, its table shows it."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bench import prepare, tables
from train.prepare.images import ImageOptions, render
from train.prepare.rejects import Rejected

SMALL = ImageOptions(sizes=((prepare.SIZE, prepare.SIZE),))


@given(st.integers(0, 2**32 - 1))
def test_a_number_is_read_back_from_the_prepared_picture(number):
    assert prepare.read_number(render(prepare.jpeg(number), SMALL).data) == number


def test_another_picture_is_not_taken_for_it():
    file = io.BytesIO()
    Image.radial_gradient("L").resize((32, 32)).save(file, "PNG")
    with pytest.raises(ValueError, match="bits do not agree"):
        prepare.read_number(file.getvalue())


def test_the_tars_hold_what_is_said(tmp_path):
    prepare.write_tars(tmp_path / "tars", 2600)
    found = {}
    for path in sorted((tmp_path / "tars").iterdir()):
        with tarfile.open(path) as tar:
            found.update({member.name: tar.extractfile(member).read() for member in tar})
    assert len(found) == 5200
    for number in range(0, 2600, 50):
        for odd, end in enumerate(("kept", "duplicate", "image_broken", "caption_empty")):
            if number % prepare.ODD == 0:
                assert prepare.fate(number + odd) == end
    assert found["000000501.jpg"] == found["000000500.jpg"]
    assert found["000000503.txt"].strip() == b""
    for number in range(2, 2600, prepare.ODD):
        with pytest.raises(Rejected, match="image_broken"):
            render(found[f"{number:09}.jpg"], SMALL)


def test_the_table():
    row = {
        "samples": 300_000, "tars": 120, "killed_at_units": [40, 81], "kept": {"train": 297_204, "val": 996},
        "skipped": {"duplicate": 600}, "samples_per_s": 1234.4, "peak_bytes": 3 << 20, "last_third_peak_bytes": 2 << 20,
    }  # fmt: skip
    result = {
        "device": "D",
        "torch": "2",
        "commit": "c",
        "command": "x",
        "side": 64,
        "size": 32,
        "workers": 2,
        "rows": [row],
    }
    line = tables.prepare_table(result).splitlines()[2]
    assert line == (
        "| 300,000 | after 40, 81 of 120 tars | 297,204 train + 996 val | 600 duplicate | 1234 | 3 MiB | 2 MiB |"
    )
