"""Whole runs of prepare: what comes out, and that it does not depend on workers, stops and restarts."""

from __future__ import annotations

import hashlib
import io
import json
import operator
import shutil
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from streaming.base.compression import decompress
from streaming.base.format import reader_from_json

from train.disk import alone
from train.prepare import convert, jsonl, shards
from train.prepare.__main__ import main
from train.prepare.journal import Journal
from train.prepare.pool import Pool
from train.prepare.rejects import PrepareFailed
from train.prepare.sources import Unit
from train.prepare.units import file_names, row_hash
from train.run import main as train_main

SIDE = 40


def picture(number):
    """A PNG of one colour that is the number's own."""
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), colour(number)).save(file, "PNG")
    return file.getvalue()


def colour(number):
    return (number % 7 * 36, number // 7 % 7 * 36, number // 49 * 36)


def write_jsonl(folder, count=60, name="a.jsonl", **changes):
    """`count` pictures and their lines; changes: {number: the line's own fields}."""
    (folder / "imgs").mkdir(exist_ok=True)
    lines = []
    for i in range(count):
        (folder / "imgs" / f"{i}.png").write_bytes(picture(i))
        lines.append(
            {"image": f"imgs/{i}.png", "caption": f"number {i}", "dense": f"long {i}", **changes.get(f"n{i}", {})}
        )
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def run(*argv, workers=1, size=32):
    try:
        return main([*map(str, argv), "--size", str(size), "--format", "png", "--workers", str(workers)])
    except SystemExit as stop:
        return stop.code


def read(folder):
    """All samples by streaming's reader, the hashes checked; no shared memory, unlike a StreamingDataset."""
    samples = []
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        raw, packed = (shard["raw_data"], shard["zip_data"])
        data = (folder / packed["basename"]).read_bytes()
        for part, content in ((packed, data), (raw, decompress(shard["compression"], data))):
            assert part["hashes"] == {"sha256": hashlib.sha256(content).hexdigest()}
            assert part["bytes"] == len(content)
        (folder / raw["basename"]).write_bytes(content)
        reader = reader_from_json(str(folder), None, shard)
        samples += [reader[i] for i in range(shard["samples"])]
        (folder / raw["basename"]).unlink()
    return samples


def contents(out):
    """Bytes of all files; of the report what is not a time."""
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    report = json.loads(files.pop("report.json"))
    return {**files, "report": {k: v for k, v in report.items() if "second" not in k and k != "samples_per_s"}}


def quarantined(out):
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def drawn_at(number):
    """The place of a line of `write_jsonl` in the draw."""
    return row_hash("a.jsonl\x000", f"imgs/{number}.png", f"imgs/{number}.png")


def tars_that_start_again(folder, names, rows):
    """Tars with the keys 000000, 000001, ... in every one; no two pictures are the same file."""
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        members = []
        for i in range(rows):
            members += [(f"{i:06}.png", picture(0) + f"{n} {i}".encode()), (f"{i:06}.txt", f"{n} {i}".encode())]
        tar_of(folder / name, members)
    return folder


def captions(folder):
    return {s["caption"] for s in read(folder)}


@pytest.fixture
def small_units(monkeypatch):
    """Eight units of 60 lines."""
    monkeypatch.setattr(jsonl, "UNIT_ROWS", 8)


def test_jsonl_comes_out_as_it_went_in(tmp_path, small_units, capsys):
    source = write_jsonl(tmp_path, n3={"url": "http://3"})
    out = tmp_path / "out"
    assert run("jsonl", source, "--out", out, "--captions", "caption", "recaption=dense", "--val", 0.2) == 0
    train, val = read(out / "train"), read(out / "val")
    assert {s["meta"]["key"] for s in val} == {f"imgs/{i}.png" for i in range(60) if drawn_at(i) < 0.2 * 2**63}
    order = [int(s["meta"]["key"][5:-4]) for s in train]
    assert order == sorted(order)
    assert sorted([*order, *(int(s["meta"]["key"][5:-4]) for s in val)]) == list(range(60))
    for sample in train + val:
        number = int(sample["meta"]["key"][5:-4])
        assert set(sample) == {"image", "caption", "recaption", "meta"}
        assert (sample["caption"], sample["recaption"]) == (f"number {number}", f"long {number}")
        image = Image.open(io.BytesIO(sample["image"]))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
        assert (np.asarray(image) == colour(number)).all()
        url = {"url": "http://3"} if number == 3 else {}
        assert sample["meta"] == {"source": str(source), "key": f"imgs/{number}.png", "size": [SIDE, SIDE], **url}
    report = json.loads((out / "report.json").read_text())
    assert (report["kept"], report["skipped"], report["rows"]) == ({"train": len(train), "val": len(val)}, {}, 60)
    assert report["bytes_in"] == sum(len(picture(i)) for i in range(60))
    assert sorted(p.name for p in out.iterdir()) == ["quarantine.jsonl", "report.json", "train", "val"]
    index = json.loads((out / "train" / "index.json").read_text())
    assert len(index["shards"]) == 1  # eight units' small shards are one
    assert index["shards"][0]["compression"] == "zstd"
    assert set(index["shards"][0]["zip_data"]["hashes"]) == {"sha256"}
    assert f"kept     train {len(train)}, val {len(val)}" in capsys.readouterr().err


def test_a_number_of_validation_samples(tmp_path, small_units):
    source = write_jsonl(tmp_path)
    assert run("jsonl", source, "--out", tmp_path / "out", "--val", 4) == 0
    wanted = sorted(range(60), key=drawn_at)[:4]
    assert {s["meta"]["key"] for s in read(tmp_path / "out" / "val")} == {f"imgs/{i}.png" for i in wanted}
    assert run("jsonl", source, "--out", tmp_path / "tenth") == 0
    assert len(read(tmp_path / "tenth" / "val")) == 6


@pytest.mark.parametrize("names", [[f"{n:05}.tar" for n in range(30)], [f"{n}/00000.tar" for n in range(30)]])
def test_keys_that_start_again_in_every_tar(tmp_path, names):
    source, out = tars_that_start_again(tmp_path / "in", names, 20), tmp_path / "out"
    assert run("webdataset", source, "--out", out) == 0
    val, train = captions(out / "val"), captions(out / "train")
    assert (len(val), len(train), len(val | train)) == (60, 540, 600)  # a tenth
    assert len({caption.split()[0] for caption in val}) > 10  # of many tars
    shutil.move(source, tmp_path / "elsewhere")
    assert run("webdataset", tmp_path / "elsewhere", "--out", tmp_path / "again") == 0
    assert captions(tmp_path / "again" / "val") == val
    assert run("webdataset", tmp_path / "elsewhere", "--out", tmp_path / "share", "--val", 0.2) == 0
    assert 90 <= len(captions(tmp_path / "share" / "val")) <= 150


def test_a_key_that_all_rows_have(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path, **{f"n{i}": {"kind": "x"} for i in range(60)})
    found = {}
    for rows in (8, 4096):  # however the file is cut into units
        monkeypatch.setattr(jsonl, "UNIT_ROWS", rows)
        assert run("jsonl", source, "--out", tmp_path / f"{rows}", "--key", "kind") == 0
        found[rows] = captions(tmp_path / f"{rows}" / "val")
    assert len(found[8]) == 6
    assert found[8] == found[4096]
    table = {"image": [picture(i) for i in range(60)], "caption": [str(i) for i in range(60)], "kind": ["x"] * 60}
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=7)
    assert run("parquet", tmp_path / "a.parquet", "--out", tmp_path / "p", "--key", "kind") == 0
    assert len(captions(tmp_path / "p" / "val")) == 6
    members = [(f"x.{e}", picture(i) if e == "png" else b"x") for i in range(60) for e in ("png", "txt")]
    tar_of(tmp_path / "a.tar", members)
    assert run("webdataset", tmp_path / "a.tar", "--out", tmp_path / "w") == 0
    report = json.loads((tmp_path / "w" / "report.json").read_text())
    assert report["kept"] == {"train": 54, "val": 6}


def test_copies_of_a_picture_are_drawn_together(tmp_path):
    order, out = sorted(range(60), key=drawn_at), tmp_path / "out"
    copies = {f"n{i}": {"image": f"imgs/{order[2]}.png"} for i in order[-6:]}
    assert run("jsonl", write_jsonl(tmp_path, **copies), "--out", out, "--duplicates", "keep") == 0
    assert captions(out / "val") == {f"number {i}" for i in order[:2]}  # with the seven it were more than a tenth
    assert len(captions(out / "train")) == 58


def test_no_more_are_drawn_than_wanted(tmp_path):
    journal = Journal(tmp_path)
    journal.plan([Unit("a", 0, None), Unit("b", 0, None)])
    journal.scanned(0, 9, [5, 5, 5, 7, 9], [], 4)
    journal.scanned(1, 9, [2, 7, 7, 8, 9], [], 4)
    assert [journal.val_below(most) for most in range(5)] == [-1, 2, 2, 2, 5]
    journal.close()


def test_files_of_one_name_are_told_apart():
    assert file_names(["/a/0.tar", "/b/0.tar", "/b/1.tar"]) == {
        "/a/0.tar": "0.tar\x000", "/b/0.tar": "0.tar\x001", "/b/1.tar": "1.tar\x000"
    }  # fmt: skip


def test_workers_do_not_change_a_byte(tmp_path, small_units):
    source = write_jsonl(tmp_path, n9={"caption": ""}, n20={"image": "imgs/3.png"}, n21={"image": "imgs/3.png"})
    for workers in (1, 3):
        assert run("jsonl", source, "--out", tmp_path / f"out{workers}", workers=workers) == 0
    one, three = contents(tmp_path / "out1"), contents(tmp_path / "out3")
    assert one == three


def test_every_reason_is_counted_and_listed(tmp_path, small_units):
    (tmp_path / "imgs").mkdir()
    (tmp_path / "cut.png").write_bytes(picture(1)[:-30])
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "small.png").write_bytes(picture(1))
    Image.new("RGB", (31, 40)).save(tmp_path / "small.png")
    changes = {
        "n1": {"caption": None}, "n2": {"caption": " "}, "n3": {"caption": "\ud800"}, "n4": {"image": "cut.png"},
        "n5": {"image": "zero.png"}, "n6": {"image": "small.png"}, "n7": {"image": "imgs/8.png"},
        "n9": {"image": "gone.png"}, "n10": {"caption": "x " * 3000}, "n11": {"caption": "no", "image": "imgs/12.png"},
    }  # fmt: skip
    out = tmp_path / "out"
    assert run("jsonl", write_jsonl(tmp_path, **changes), "--out", out, "--min-caption", 3, "--val", 0) == 0
    listed = {record["key"]: record["reason"] for record in quarantined(out)}
    assert listed == {
        "imgs/1.png": "caption_missing", "imgs/2.png": "caption_empty", "imgs/3.png": "caption_not_utf8",
        "cut.png": "image_broken", "zero.png": "image_empty", "small.png": "image_small", "imgs/8.png": "duplicate",
        "gone.png": "image_missing", "imgs/12.png": "caption_short",
    }  # fmt: skip
    assert len(quarantined(out)) == 9
    report = json.loads((out / "report.json").read_text())
    assert report["skipped"] == dict.fromkeys(sorted(listed.values()), 1)
    assert report["kept"] == {"train": 51}
    assert report["captions_cut"] == 1
    captions = {s["caption"] for s in read(out / "train")}
    assert "number 12" in captions  # its picture came first with a caption that is too short
    assert "number 7" in captions
    assert ("x " * 2000)[:-1] in captions


def test_duplicates_are_kept_where_wanted(tmp_path):
    source = write_jsonl(tmp_path, n5={"image": "imgs/4.png"})
    assert run("jsonl", source, "--out", tmp_path / "out", "--duplicates", "keep") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (sum(report["kept"].values()), report["skipped"]) == (60, {})


def test_buckets(tmp_path):
    shapes = {"wide": (160, 80), "tall": (80, 160), "square": (100, 100), "nearly": (110, 100)}
    lines = []
    for name, size in shapes.items():
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
        lines.append(json.dumps({"image": f"{name}.png", "caption": name}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    flags = ("--buckets", "square,2:1,1:2", "--bucket-step", 16, "--val", 0, "--min-side", 0, "--duplicates", "keep")
    assert run("jsonl", tmp_path / "a.jsonl", "--out", tmp_path / "out", *flags, size=64) == 0
    found = {}
    assert json.loads((tmp_path / "out" / "train" / "buckets.json").read_text()) == ["48x96", "64x64", "96x48"]
    for folder in (path for path in (tmp_path / "out" / "train").iterdir() if path.is_dir()):
        width, height = map(int, folder.name.split("x"))
        for sample in read(folder):
            assert Image.open(io.BytesIO(sample["image"])).size == (width, height)
            found[sample["caption"]] = folder.name
    assert found == {"wide": "96x48", "tall": "48x96", "square": "64x64", "nearly": "64x64"}


def test_webdataset_with_a_cut_tar(tmp_path):
    members = [
        (f"{i}.{e}", picture(i) if e == "png" else f"number {i}".encode()) for i in range(8) for e in ("png", "txt")
    ]
    tars = [tar_of(tmp_path / f"{n}.tar", members[4 * n : 4 * n + 4]) for n in range(4)]
    tars[1].write_bytes(tars[1].read_bytes()[:2100])  # in the header of the second picture
    tars[2].write_bytes(b"")
    assert run("webdataset", tmp_path, "--out", tmp_path / "out", "--val", 0, workers=2) == 0
    captions = [s["caption"] for s in read(tmp_path / "out" / "train")]
    assert captions == ["number 0", "number 1", "number 2", "number 6", "number 7"]
    listed = [(record["source"], record["key"], record["reason"]) for record in quarantined(tmp_path / "out")]
    assert listed == [(str(tars[1]), None, "source_broken"), (str(tars[2]), None, "source_broken")]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["broken_sources"] == 2


def test_a_broken_file_beside_a_tar_costs_what_needs_it(tmp_path):
    members = [(f"{i}.{e}", picture(i) if e == "png" else b"%d" % i) for i in range(4) for e in ("png", "txt")]
    members.remove(("1.txt", b"1"))
    tar_of(tmp_path / "a.tar", [*members, ("3.json", b"{")])
    pq.write_table(pa.table({"key": ["1"], "txt": ["one"]}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    assert run("webdataset", tmp_path, "--out", out, "--val", 0) == 0
    assert captions(out / "train") == {"0", "2", "3"}
    one, broken = quarantined(out)
    assert (one["key"], one["reason"]) == ("1", "sidecar_broken")
    assert (broken["key"], broken["reason"]) == (None, "source_broken")
    assert str(tmp_path / "a.parquet") in broken["detail"]
    report = json.loads((out / "report.json").read_text())
    assert (report["rows"], report["skipped"], report["broken_sources"]) == (4, {"sidecar_broken": 1}, 1)


def test_pictures_that_change_between_the_passes(tmp_path, monkeypatch):
    source, out = write_jsonl(tmp_path, n50={"image": "imgs/8.png"}), tmp_path / "out"
    (tmp_path / "imgs" / "7.png").unlink()
    second = convert._Run.convert

    def change(self, *arguments):
        (tmp_path / "imgs" / "5.png").write_bytes(picture(100))
        (tmp_path / "imgs" / "7.png").write_bytes(picture(7))
        second(self, *arguments)

    monkeypatch.setattr(convert._Run, "convert", change)
    assert run("jsonl", source, "--out", out, "--val", 0) == 0
    assert [(record["key"], record["reason"]) for record in quarantined(out)] == [
        ("imgs/5.png", "image_changed"), ("imgs/7.png", "image_changed"), ("imgs/8.png", "duplicate")
    ]  # fmt: skip
    assert captions(out / "train") == {f"number {i}" for i in range(60)} - {"number 5", "number 7", "number 50"}


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%20b", "a b"])
def test_a_folder_of_any_name(tmp_path, name):
    assert run("jsonl", write_jsonl(tmp_path), "--out", tmp_path / name / "out", "--val", 0) == 0
    assert len(read(tmp_path / name / "out" / "train")) == 60


def test_a_run_that_keeps_nothing_fails(tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(b"junk" * 1000)
    out = tmp_path / "out"
    for _ in range(2):  # finished, too
        assert run("webdataset", tmp_path / "a.tar", "--out", out) == 1
        assert f"error: kept: wanted a sample, got none; {out}/report.json and" in capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert (report["kept"], report["broken_sources"]) == ({}, 1)


def test_a_compressed_tar_is_named_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "b.tar.gz").write_bytes(b"\x1f\x8b")
    assert run("webdataset", tmp_path / "b.tar.gz", "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"input: wanted tars that are not compressed, got {tmp_path}/b.tar.gz; decompress it first" in line


def test_an_error_of_a_worker_is_told_as_what_it_is():
    unit = (7, Unit("a.jsonl", 0, None))
    with (
        Pool(1, operator.truediv, (1, 0)) as pool,
        pytest.raises(PrepareFailed, match=r"^unit 7 \(a\.jsonl\): ZeroDivisionError: division by zero; the same"),
    ):
        next(pool.run(iter([unit]), lambda rows: None))


def test_parquet(tmp_path):
    table = {
        "image": [{"bytes": picture(i), "path": None} for i in range(20)],
        "text": [f"number {i}" for i in range(20)],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=7)
    flags = ("--captions", "text", "--val", 0)
    assert run("parquet", tmp_path / "a.parquet", "--out", tmp_path / "out", *flags) == 0
    samples = read(tmp_path / "out" / "train")
    assert [s["caption"] for s in samples] == [f"number {i}" for i in range(20)]
    assert [s["meta"]["key"] for s in samples] == [f"a.parquet:{i}" for i in range(20)]
    for i, sample in enumerate(samples):
        assert (np.asarray(Image.open(io.BytesIO(sample["image"]))) == colour(i)).all()


# stops and restarts


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(source, contents of a run that nothing disturbed): eight units, copies, bad captions, two splits."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_jsonl(folder, n9={"caption": ""}, n20={"image": "imgs/3.png"}, n40={"image": "imgs/39.png"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "UNIT_ROWS", 8)
        assert run("jsonl", source, "--out", folder / "out") == 0
    return source, contents(folder / "out")


@pytest.fixture
def unbroken(whole, small_units):
    """The same, for runs with its units."""
    return whole


@pytest.mark.parametrize("stop_at", [0, 7])
@pytest.mark.parametrize("when", ["before", "after"])
def test_stopped_between_moves_and_the_journal(unbroken, tmp_path, monkeypatch, capsys, stop_at, when):
    source, whole = unbroken
    real, calls = convert.Journal.converted, []

    def stop(self, number, result):
        calls.append(number)
        if when == "after" or len(calls) <= stop_at:
            real(self, number, result)
        if len(calls) > stop_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert.Journal, "converted", stop)
        assert run("jsonl", source, "--out", tmp_path / "out") == 130
    done = stop_at + (when == "after")
    assert f"stopped; {done} of 8 units are done, the same command continues" in capsys.readouterr().err
    assert run("jsonl", source, "--out", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("name", "call", "when"),
    [
        ("_merge", 1, "before"), ("_merge", 2, "after"), ("replace_text", 1, "after"), ("replace_text", 2, "before"),
        ("replace_text", 3, "before"), ("remove_others", 1, "before"), ("remove_others", 1, "after"),
    ],
)  # fmt: skip
def test_stopped_while_the_shards_are_joined(unbroken, tmp_path, monkeypatch, name, call, when):
    source, whole = unbroken
    place = shards if name == "_merge" else convert
    real, calls = getattr(place, name), []

    def stop(*arguments):
        if journaled():
            calls.append(1)
        if len(calls) == call and when == "before":
            raise OSError(28, "No space left on device")
        result = real(*arguments)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return result

    def journaled():
        return name != "remove_others" or (tmp_path / "out" / "train" / "index.json").exists()

    with monkeypatch.context() as patch:
        patch.setattr(place, name, stop)
        if place is convert and name == "replace_text":
            patch.setattr(shards, name, stop)
        code = run("jsonl", source, "--out", tmp_path / "out")
    assert code == 1
    assert run("jsonl", source, "--out", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == whole


def test_stopped_in_the_first_pass_and_in_the_plan(unbroken, tmp_path, monkeypatch):
    source, whole = unbroken
    real, calls = convert.Journal.scanned, []

    def stop_scan(self, *arguments):
        real(self, *arguments)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    units = jsonl.Jsonl.units

    def stopping(self, tick):
        for i, unit in enumerate(units(self, tick)):
            if i == 3:
                raise KeyboardInterrupt
            yield unit

    with monkeypatch.context() as patch:
        patch.setattr(jsonl.Jsonl, "units", stopping)
        assert run("jsonl", source, "--out", tmp_path / "out") == 130
    with monkeypatch.context() as patch:
        patch.setattr(convert.Journal, "scanned", stop_scan)
        assert run("jsonl", source, "--out", tmp_path / "out") == 130
    assert run("jsonl", source, "--out", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("finished", [True, False])
def test_other_arguments_are_refused(tmp_path, small_units, monkeypatch, capsys, finished):
    source, out = write_jsonl(tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(convert.Journal, "converted", lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run("jsonl", source, "--out", out)
        else:
            assert run("jsonl", source, "--out", out) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run("jsonl", source, "--out", out, "--min-side", 3) == 2
    assert "min-side: " in (error := capsys.readouterr().err)
    assert "was begun with None, not 3" in error
    assert error.count("\n") == 1
    other = write_jsonl(tmp_path, count=61, name="b.jsonl")
    assert run("jsonl", other, "--out", out) == 2
    assert f"input: {out} was begun with {source}" in capsys.readouterr().err
    if finished:
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_finished_folder_says_so(tmp_path, capsys):
    source, out = write_jsonl(tmp_path), tmp_path / "out"
    assert run("jsonl", source, "--out", out) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert run("jsonl", source, "--out", out, workers=2) == 0
    assert capsys.readouterr().err == f"prepare: {out} is finished: 60 samples\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_folder_of_other_files_is_not_touched(tmp_path, capsys):
    source, out = write_jsonl(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert run("jsonl", source, "--out", out) == 2
    assert "holds files but no run of prepare" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_two_at_once_are_refused(tmp_path, capsys):
    source, out = write_jsonl(tmp_path), tmp_path / "out"
    (out / ".prepare").mkdir(parents=True)
    with alone(out / ".prepare" / "lock", AssertionError()):
        assert run("jsonl", source, "--out", out) == 2
    assert f"out: another process prepares {out}" in capsys.readouterr().err
    assert run("jsonl", source, "--out", out) == 0


# what is said


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--captions", "text"], "none of the first 60 rows of {source} can be used: no caption in 'text'"),
        (["--image", "file"], "can be used: row_field: wanted a path in 'file'; the line has image, caption, dense"),
        (["--captions", "caption", "image"], "captions: the column 'image' is taken"),
        (["--captions", "a=caption"], "captions: wanted FIELD or COLUMN=FIELD, the first one alone"),
        (["--val", "1.5"], "val: wanted a share below 1 or a whole number, got 1.5"),
        (["--buckets", "wide"], "buckets: wanted a number, or square,3:4,4:3,..., got 'wide'"),
        (["--buckets", "3"], "bucket-step: wanted at most --size, which is 32, got 64"),
        (["--quality", "101"], "quality: wanted a number from 1 to 100, got 101"),
        (["--root", "/nowhere"], "root: wanted a folder, found none at /nowhere"),
        (["--max-caption", "0"], "max-caption: wanted a number from 1 to"),
        (["--format", "gif"], "argument --format: invalid choice: 'gif'"),
    ],
)  # fmt: skip
def test_bad_flags_give_one_line_and_exit_code_2(tmp_path, capsys, flags, named):
    source = write_jsonl(tmp_path)
    assert run("jsonl", source, "--out", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert named.format(source=source) in error
    assert error.count("\n") == 1
    assert list(tmp_path.rglob("*.mds*")) == []


def test_the_right_flags_may_follow_wrong_ones(tmp_path):
    source, out = write_jsonl(tmp_path), tmp_path / "out"
    assert run("jsonl", source, "--out", out, "--captions", "text") == 2
    assert run("jsonl", source, "--out", out, "--captions", "caption") == 0


@pytest.mark.parametrize(("name", "suffix"), [("jsonl", ".jsonl.zst"), ("parquet", ".parquet")])
def test_missing_pyarrow_names_the_extra(tmp_path, monkeypatch, capsys, name, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"x")
    for module in [m for m in sys.modules if m.split(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, module, None)
    assert run(name, tmp_path / f"a{suffix}", "--out", tmp_path / "out") == 2
    assert "needs pyarrow: pip install 'semantic-routing[prepare]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["jsonl", "webdataset", "parquet"])
def test_help_has_every_flag_and_an_example(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert f"example:\n  python -m train.prepare {name} " in text
    for flag in ("out", "captions", "size", "buckets", "val", "max-pixels", "duplicates", "shard-mb", "workers"):
        assert f"--{flag} " in text


def test_training_reads_what_prepare_writes(tmp_path, tiny_flags):
    source = write_jsonl(tmp_path)
    assert main(["jsonl", str(source), "--out", str(tmp_path / "data"), "--size", "32", "--workers", "1"]) == 0
    flags = [*tiny_flags, f"--data.path={tmp_path / 'data'}", "--data.image_size=32", "--steps=2"]
    (tmp_path / "prompts.txt").write_text("a red circle\nthree blue squares\n")
    flags.append(f"--eval.prompts={tmp_path / 'prompts.txt'}")
    assert train_main([*flags, f"--out={tmp_path / 'run'}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert any("val_loss" in row for row in rows)
