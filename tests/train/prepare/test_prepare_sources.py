"""Rows of every kind of source, whole and broken, with bounded lines."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from train.prepare import jsonl, webdataset
from train.prepare.captions import CaptionOptions, check
from train.prepare.jsonl import Jsonl
from train.prepare.parquet import Parquet
from train.prepare.rejects import Broken, Rejected
from train.prepare.sources import Bad, Unit, expand
from train.prepare.webdataset import Webdataset
from train.shapes.corpus import BadArgument


def units(source):
    return list(source.units(lambda count: None))


def all_rows(source):
    return [row for unit in units(source) for row in source.rows(unit)]


def rows_until_broken(source, unit):
    rows = []
    with pytest.raises(Broken) as caught:
        rows.extend(iter_into(rows, source.rows(unit)))
    return rows, str(caught.value)


def iter_into(rows, iterator):
    for row in iterator:
        rows.append(row)
    return ()


def json_lines(path, fields=("caption",), root=None, key=None, limit=1000):
    return Jsonl((str(path),), root, "image", key, tuple(fields), limit)


# captions


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "caption_missing"), ("  \n", "caption_empty"), ("ab", "caption_short"),
        (b"\xff\xfe", "caption_not_utf8"), ("a\ud800b", "caption_not_utf8"),
        (3, "caption_not_text"), (["a cat"], "caption_not_text"),
    ],
)  # fmt: skip
def test_captions_that_are_refused(value, reason):
    with pytest.raises(Rejected) as caught:
        check(value, "txt", CaptionOptions(shortest=3))
    assert caught.value.reason == reason
    assert "txt" in caught.value.detail


@given(st.text(st.characters(codec="utf-8"), max_size=60), st.integers(1, 40))
def test_long_captions_are_cut_after_a_word(text, longest):
    clean = text.strip()
    assume(clean)
    got, cut = check(text, "txt", CaptionOptions(longest=longest))
    assert cut == (len(clean) > longest)
    assert 1 <= len(got) <= longest
    assert clean.startswith(got)
    if cut and len(clean[: longest + 1].split()) > 1:
        assert clean[len(got)].isspace()  # no word is cut where one fits


def test_a_caption_of_a_million_characters():
    text = "word " * 200_000
    assert check(text, "txt", CaptionOptions(longest=4000)) == (text[:3999], True)
    with pytest.raises(Rejected, match="caption_long: txt: 999999 characters, wanted at most 4000"):
        check(text, "txt", CaptionOptions(longest=4000, long="drop"))
    assert check("x" * 10**6, "txt", CaptionOptions(longest=4000)) == ("x" * 4000, True)


# JSON lines


def write_lines(path, content):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        path.write_bytes(pa.Codec("zstd").compress(content, asbytes=True))
    else:
        path.write_bytes(content)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b" ")), max_size=30),
    st.booleans(), st.integers(1, 64), st.sampled_from(["", ".gz", ".zst"]), st.data(),
)  # fmt: skip
def test_lines_are_the_files_lines_from_any_of_them(tmp_path_factory, parts, end, block, suffix, data):
    content = b"\n".join(parts) + b"\n" * end
    path = tmp_path_factory.mktemp("x") / f"a.jsonl{suffix}"
    write_lines(path, content)
    want, at = [], 0
    for line in io.BytesIO(content):
        text = line.removesuffix(b"\n")
        want.append((at, text if len(text) <= 30 else None))
        at += len(line)
    patch = pytest.MonkeyPatch()
    patch.setattr(jsonl, "BLOCK", block)
    patch.setattr(jsonl, "LONGEST_LINE", 30)
    try:
        assert list(jsonl.lines(str(path))) == want
        if want:
            i = data.draw(st.integers(0, len(want) - 1))
            assert list(jsonl.lines(str(path), want[i][0])) == want[i:]
    finally:
        patch.undo()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_units_cover_every_line_once(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(jsonl, "UNIT_ROWS", 7)
    path = tmp_path / f"a.jsonl{suffix}"
    write_lines(
        path, b"".join(json.dumps({"image": f"{i}.png", "caption": f"c{i}"}).encode() + b"\n" for i in range(600))
    )
    source = json_lines(path)
    assert len(units(source)) == (64 if suffix else 86)
    rows = all_rows(source)
    assert [row.key for row in rows] == [f"{i}.png" for i in range(600)]
    assert [row.captions for row in rows] == [{"caption": f"c{i}"} for i in range(600)]


def test_lines_of_every_kind(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    lines = [
        '{"image": "a.png", "caption": "good", "url": "http://x", "id": 7}', "", "not json", "[1]", '{"caption": "x"}',
        '{"image": "../a.png", "caption": "out", "id": 8}', '{"image": "/etc/passwd", "caption": "out", "id": 9}',
        '{"image": "gone.png", "caption": "gone", "id": 10}', '{"image": ".", "caption": "a folder", "id": 11}',
        '{"image": "a.png", "caption": "no id"}', "[" * 100_000, '{"image": "a\\u0000.png", "caption": "x", "id": 12}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = all_rows(json_lines(tmp_path / "a.jsonl", key="id"))
    found = []
    for row in rows:
        if isinstance(row, Bad):
            found.append(row.why.reason)
            continue
        try:
            found.append((row.key, row.load(), row.captions["caption"], row.url))
        except Rejected as why:
            found.append(why.reason)
    assert found == [
        ("7", b"picture", "good", "http://x"), "row_not_json", "row_not_json", "row_field", "image_outside",
        "image_outside", "image_missing", "image_missing", "row_field", "row_not_json", "image_missing",
    ]  # fmt: skip


def test_an_image_file_over_the_limit_is_not_read(tmp_path):
    (tmp_path / "a.png").write_bytes(bytes(101))
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "caption": "x"}')
    (row,) = all_rows(json_lines(tmp_path / "a.jsonl", limit=100))
    with pytest.raises(Rejected, match="image_bytes: 101 bytes, wanted at most 100"):
        row.load()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_compressed_file_is_kept_as_far_as_it_goes(tmp_path, suffix):
    noise = random.Random(0)
    records = [json.dumps({"image": f"{i}.png", "caption": f"{noise.random()}"}) for i in range(20_000)]
    path = tmp_path / f"a.jsonl{suffix}"
    write_lines(path, "\n".join(records).encode())
    path.write_bytes(path.read_bytes()[: -100_000 // 5])
    source = json_lines(path)
    planned, rows = units(source), []
    for unit in planned[:-1]:
        rows += source.rows(unit)
    rest, why = rows_until_broken(source, planned[-1])
    keys = [row.key for row in rows + rest]
    assert keys == [f"{i}.png" for i in range(len(keys))]
    assert len(keys) > 8192
    assert "Error" in why


# webdataset


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_tar_samples(tmp_path):
    path = tar_of(
        tmp_path / "00000.tar",
        [
            ("0.jpg", b"zero"), ("0.txt", b"in the tar"), ("0.json", b'{"url": "http://0", "alt": "zero"}'),
            ("a/1.PNG", b"one"), ("a/1.json", b'{"txt": "in json", "alt": "uno"}'),
            ("2.seg.webp", b""), ("2.webp", b"two"), ("2.json", b'{"alt": "dos"}'),
            ("3.txt", b"no image"), ("4.gif", b"x"), ("4.txt", b"gif"),
            ("5.jpg", b"x"), ("5.txt", b"x"), ("5.json", b"{"), ("notes.md", b"x"),
        ],
    )  # fmt: skip
    table = {"key": ["2", "9"], "txt": ["beside", "x"], "url": ["http://2", "x"]}
    pq.write_table(pa.table(table), tmp_path / "00000.parquet")
    rows = all_rows(Webdataset((str(path),), ("txt", "alt"), 1000))
    good = [(row.key, row.captions, row.url) for row in rows if not isinstance(row, Bad)]
    assert good == [
        ("0", {"txt": b"in the tar", "alt": "zero"}, "http://0"),
        ("a/1", {"txt": "in json", "alt": "uno"}, None),
        ("2", {"txt": "beside", "alt": "dos"}, "http://2"),
    ]
    bad = [(row.key, row.why.reason) for row in rows if isinstance(row, Bad)]
    assert bad == [("3", "image_missing"), ("4", "image_format"), ("5", "row_not_json")]


def test_a_broken_json_or_parquet_file_costs_only_what_needs_it(tmp_path):
    members = [("0.jpg", b""), ("0.txt", b"zero"), ("0.json", b"{"), ("1.jpg", b""), ("1.json", b"{")]
    path = tar_of(tmp_path / "a.tar", [*members, ("2.jpg", b""), ("2.json", b'{"txt": "two"}'), ("3.jpg", b"")])
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    source = Webdataset((str(path),), ("txt",), 1000)
    rows, why = rows_until_broken(source, Unit(str(path), 0, None))
    found = [(row.key, row.why.reason if isinstance(row, Bad) else row.captions["txt"]) for row in rows]
    assert found == [("0", b"zero"), ("1", "row_not_json"), ("2", "two"), ("3", "sidecar_broken")]
    assert "0.json: row_not_json" in why
    assert f"{tmp_path}/a.parquet: Arrow" in why


def test_a_cell_beside_a_tar_that_is_not_utf8(tmp_path):
    path = tar_of(tmp_path / "a.tar", [("0.jpg", b""), ("1.jpg", b"")])
    text = pa.array([b"good", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"key": ["0", "1"], "txt": text}), tmp_path / "a.parquet")
    rows = all_rows(Webdataset((str(path),), ("txt",), 1000))
    assert [row.captions["txt"] for row in rows] == ["good", b"\xff"]


def test_no_picture_of_a_tar_is_overlooked(tmp_path):
    members = [("0.jpg", b"a"), ("0.txt", b"x"), ("0.jpg", b"b"), ("0.txt", b"y"), ("1.v2.jpg", b""), ("1.v2.txt", b"")]
    path = tar_of(tmp_path / "a.tar", members)
    source = Webdataset((str(path),), ("txt",), 1000)
    found = [row if isinstance(row, Bad) else (row, row.load()) for row in source.rows(units(source)[0])]
    (first, a), (second, b), bad = found
    assert (a, first.captions["txt"], b, second.captions["txt"]) == (b"a", b"x", b"b", b"y")
    assert first.place != second.place
    assert str(bad.why) == "image_format: wanted 1.jpg, 1.jpeg, 1.png, 1.webp, got .v2.jpg"


def test_a_member_that_the_disk_cannot_read():
    class Disk(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    with pytest.raises(Rejected, match=r"row_cut: 0\.jpg: .*Input/output error"):
        webdataset._read(Disk(), tarfile.TarInfo("0.jpg"))


@pytest.fixture
def tar(tmp_path):
    names = [(f"{i}.{e}", f"{i}{e}".encode() * 300) for i in range(10) for e in ("jpg", "txt")]
    return tar_of(tmp_path / "a.tar", names)


def test_images_of_a_tar_are_read_where_they_lie(tar):
    source = Webdataset((str(tar),), ("txt",), 10_000)
    assert [row.load() for row in source.rows(units(source)[0])] == [f"{i}jpg".encode() * 300 for i in range(10)]
    limited = Webdataset((str(tar),), ("txt",), 100)
    for row in limited.rows(units(limited)[0]):
        with pytest.raises(Rejected, match="image_bytes"):
            row.load()


@settings(max_examples=60, deadline=None)
@given(part=st.floats(0, 0.999))
def test_a_cut_tar_is_kept_as_far_as_it_goes(tmp_path_factory, part):
    folder = tmp_path_factory.mktemp("t")
    names = [(f"{i}.{e}", f"{i}{e}".encode() * 300) for i in range(10) for e in ("jpg", "txt")]
    path = tar_of(folder / "a.tar", names)
    whole = path.read_bytes()
    used = 20 * 2048  # a header and three blocks for every member
    cut = int(part * used)
    path.write_bytes(whole[:cut])
    source = Webdataset((str(path),), ("txt",), 10_000)
    rows, _ = rows_until_broken(source, Unit(str(path), 0, None))
    complete = [
        row for row in rows if not isinstance(row, Bad) and row.captions["txt"] == f"{row.key}txt".encode() * 300
    ]
    assert [row.key for row in complete] == [str(i) for i in range(len(complete))]
    assert len(complete) >= cut // 4096 - 1


def test_an_overwritten_header_is_not_taken_for_the_end(tar):
    data = bytearray(tar.read_bytes())
    data[6 * 2048 : 6 * 2048 + 512] = b"\x55" * 512
    tar.write_bytes(data)
    rows, why = rows_until_broken(Webdataset((str(tar),), ("txt",), 10_000), Unit(str(tar), 0, None))
    assert [row.key for row in rows] == ["0", "1", "2"]
    assert "12288" in why


@pytest.mark.parametrize("content", [b"", b"junk" * 1000])
def test_a_file_that_is_no_tar(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    assert rows_until_broken(Webdataset(("x",), ("txt",), 1), Unit(str(tmp_path / "a.tar"), 0, None))[0] == []


def test_tars_keep_no_list_of_their_members(tar):
    with tarfile.open(tar) as opened:
        for _ in webdataset.members(opened):
            assert opened.members == []


# Parquet


def test_parquet_rows(tmp_path):
    pictures = [{"bytes": b"a", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    table = {"image": pictures, "text": ["x", None, "z"], "id": [5, 6, 7], "url": ["http://5", None, None]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=2)
    rows = all_rows(Parquet((str(tmp_path / "a.parquet"),), "image", "id", ("text",), 10))
    assert [(r.key, r.captions, r.url) for r in rows] == [
        ("5", {"text": "x"}, "http://5"), ("6", {"text": None}, None), ("7", {"text": "z"}, None)
    ]  # fmt: skip
    assert rows[0].load() == b"a"
    for row in rows[1:]:
        with pytest.raises(Rejected, match="image_missing"):
            row.load()


def test_parquet_units_are_row_groups_together(tmp_path, monkeypatch):
    from train.prepare import parquet

    monkeypatch.setattr(parquet, "UNIT_ROWS", 25)
    table = pa.table({"image": [bytes([i]) for i in range(100)], "caption": [str(i) for i in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    source = Parquet((str(tmp_path / "a.parquet"),), "image", None, ("caption",), 10)
    assert [unit[1:] for unit in units(source)] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    rows = all_rows(source)
    assert [row.key for row in rows] == [f"a.parquet:{i}" for i in range(100)]
    assert [row.load() for row in rows] == [bytes([i]) for i in range(100)]


def test_a_missing_parquet_column_is_named(tmp_path):
    pq.write_table(pa.table({"image": [b"x"], "text": ["x"]}), tmp_path / "a.parquet")
    source = Parquet((str(tmp_path / "a.parquet"),), "image", None, ("caption",), 10)
    with pytest.raises(BadArgument, match=r"^input: wanted a column 'caption' in .*a\.parquet, it has image, text$"):
        units(source)


def test_a_text_column_that_is_not_utf8(tmp_path):
    text = pa.array([b"good", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"image": [b"x", b"y"], "caption": text}), tmp_path / "a.parquet")
    rows = all_rows(Parquet((str(tmp_path / "a.parquet"),), "image", None, ("caption",), 10))
    assert [row.captions["caption"] for row in rows] == ["good", b"\xff"]


def test_a_parquet_cell_that_cannot_be_had_costs_its_row(tmp_path):
    bad = pa.array([b"good", b"\xff", b"good"]).view(pa.string())
    image = pa.StructArray.from_arrays([pa.array([b"a", b"b", None], pa.binary()), bad], ["bytes", "path"])
    several = pa.ListArray.from_arrays([0, 1, 2, 3], bad)
    codes = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1], pa.int8()), pa.array(["one", "zero"]))
    bad_codes = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int8()), bad[:2])
    table = {"image": image, "several": several, "codes": codes, "bad": bad_codes, "url": bad, "id": [1, 2, 3]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    rows = all_rows(Parquet((str(tmp_path / "a.parquet"),), "image", "id", ("several", "codes", "bad"), 10))
    assert [row.load() for row in rows[:2]] == [b"a", b"b"]
    with pytest.raises(Rejected, match="image_missing: no bytes in 'image'"):
        rows[2].load()
    assert [row.captions["codes"] for row in rows] == ["zero", "one", "zero"]
    assert [row.captions["bad"] for row in rows] == ["good", b"\xff", "good"]
    assert [row.url for row in rows] == ["good", None, "good"]
    for row, got in ((rows[0], "list"), (rows[1], "UnicodeDecodeError")):
        with pytest.raises(Rejected, match=f"caption_not_text: several: wanted text, got {got}"):
            check(row.captions["several"], "several", CaptionOptions())


@pytest.mark.parametrize(("image", "why"), [
    (pa.array([{"path": "a.png"}]), "'image': KeyError"), (pa.array(["text"]), "wanted bytes in 'image', got str"),
    (pa.array([b"\xff"]).view(pa.string()), "'image': UnicodeDecodeError"),
])  # fmt: skip
def test_parquet_images_that_are_none(tmp_path, image, why):
    pq.write_table(pa.table({"image": image, "caption": ["x"]}), tmp_path / "a.parquet")
    (row,) = all_rows(Parquet((str(tmp_path / "a.parquet"),), "image", None, ("caption",), 10))
    with pytest.raises(Rejected, match=f"image_missing: {why}"):
        row.load()


def test_a_broken_parquet_file_is_met_by_its_rows(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100))
    source = Parquet((str(tmp_path / "a.parquet"),), "image", None, ("caption",), 10)
    (unit,) = units(source)
    assert rows_until_broken(source, unit)[0] == []


def test_files_are_found_in_folders_and_missing_ones_named(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("2.tar", "b/1.tar", "x.txt"):
        (tmp_path / name).touch()
    found = [str(tmp_path / "2.tar"), str(tmp_path / "b" / "1.tar")]
    assert expand("input", [str(tmp_path)], (".tar",)) == tuple(found)
    assert expand("input", [found[1], str(tmp_path)], (".tar",)) == tuple(found[::-1])
    with pytest.raises(BadArgument, match="input: wanted a file or folder, found none at"):
        expand("input", [str(tmp_path / "gone")], (".tar",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadArgument, match=r"input: wanted files \*\.tar in .*, found none"):
        expand("input", [str(tmp_path / "empty")], (".tar",))
