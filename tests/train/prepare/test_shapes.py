"""The prepare command: shards read back, reuse, atomic writing, one-line errors."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming import StreamingDataset

from train.prepare import prepare_shapes, shapes
from train.prepare.__main__ import main
from train.shapes.corpus import DEFAULT_MIX, BadArgument, read_prompts
from train.shapes.render import render
from train.shapes.scene import Scene
from train.shapes.scorer import score

SMALL = {"samples": 200, "captions": 100, "val": 9, "prompts": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shapes"
    prepare_shapes(out, **SMALL)
    return out


def read(folder: Path) -> list[dict]:
    return list(StreamingDataset(local=str(folder), shuffle=False, batch_size=1))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("split", "count"), [("train", 200), ("val", 9)])
def test_shards_read_back_as_written(corpus, split, count):
    samples = read(corpus / split)
    assert len(samples) == count
    for sample in samples:
        assert set(sample) == {"image", "caption", "meta"}
        image = Image.open(io.BytesIO(sample["image"]))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
        assert set(sample["meta"]) == {"skill", "split", "scene"}
        scene = Scene.from_json(sample["meta"]["scene"])
        np.testing.assert_array_equal(np.asarray(image), render(scene, 32))
        assert score(scene, np.asarray(image)).passed
        assert sample["caption"] == scene.prompt.caption
        assert sample["meta"]["skill"] == scene.prompt.skill
        assert sample["meta"]["split"] == "train-distribution"
    skills = Counter(sample["meta"]["skill"] for sample in samples)
    assert json.loads((corpus / "corpus.json").read_text())["counts"][split] == skills


def test_captions_are_bounded_and_validation_scenes_are_new(corpus):
    train, val = read(corpus / "train"), read(corpus / "val")
    captions = {sample["caption"] for sample in train}
    assert len(captions) == 100
    assert {sample["caption"] for sample in val} <= captions
    scenes = [json.dumps(sample["meta"]["scene"]) for sample in train + val]
    assert len(set(scenes)) == len(scenes)


def test_evaluation_prompts_file(corpus):
    train_captions = {sample["caption"] for sample in read(corpus / "train")}
    records = [json.loads(line) for line in (corpus / "prompts.jsonl").read_text().splitlines()]
    assert len(records) == 40
    for record, (split, scene) in zip(records, read_prompts(corpus), strict=True):
        assert set(record) == {"caption", "skill", "split", "scene"}
        assert (record["caption"], record["skill"]) == (scene.prompt.caption, scene.prompt.skill)
        assert record["split"] == split
        assert (record["caption"] in train_captions) == (split == "train-distribution")
        assert score(scene.prompt, render(scene, 32)).passed


def test_corpus_json_and_folder(corpus):
    assert sorted(path.name for path in corpus.iterdir()) == ["corpus.json", "prompts.jsonl", "train", "val"]
    assert [path.name for path in corpus.parent.iterdir()] == ["shapes"]
    found = json.loads((corpus / "corpus.json").read_text())
    assert (found["format"], found["version"]) == ("shapes", 1)
    assert found["arguments"] == {**SMALL, "size": 32, "seed": 0, "mix": DEFAULT_MIX, "compression": "none"}
    assert sum(found["counts"]["captions"].values()) == 100
    index = json.loads((corpus / "train" / "index.json").read_text())
    assert dict(zip(index["shards"][0]["column_names"], index["shards"][0]["column_encodings"], strict=True)) == {
        "image": "bytes",
        "caption": "str",
        "meta": "json",
    }
    assert set(index["shards"][0]["raw_data"]["hashes"]) == {"sha256"}


def test_the_same_seed_gives_identical_bytes_and_another_does_not(corpus, tmp_path):
    prepare_shapes(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(corpus)
    prepare_shapes(tmp_path / "other", **SMALL, seed=1)
    other = contents(tmp_path / "other")
    assert all(other[name] != data for name, data in contents(corpus).items())


def test_compressed_shards_hold_the_same(corpus, tmp_path):
    prepare_shapes(tmp_path / "zstd", **SMALL, compression="zstd")
    assert [path.suffix for path in (tmp_path / "zstd" / "train").glob("shard*")] == [".zstd"]
    assert read(tmp_path / "zstd" / "train") == read(corpus / "train")


def test_size_and_mix_are_used(tmp_path):
    prepare_shapes(tmp_path / "x", samples=6, captions=3, size=64, val=1, prompts=1, mix={"part": 2, "scene": 1})
    samples = read(tmp_path / "x" / "train")
    assert {Image.open(io.BytesIO(sample["image"])).size for sample in samples} == {(64, 64)}
    assert Counter(sample["meta"]["skill"] for sample in samples) == {"part": 4, "scene": 2}


def test_the_same_corpus_is_reused(corpus, capsys):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert prepare_shapes(corpus, **SMALL) == json.loads((corpus / "corpus.json").read_text())
    assert capsys.readouterr().err == f"shapes: reusing the corpus in {corpus} (200 samples, 100 captions)\n"
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 3}, "seed 0, not 3"), ({"samples": 201}, "samples 200, not 201"), ({"size": 64}, "32")],
)
def test_another_corpus_is_not_overwritten(corpus, change, named):
    before = contents(corpus)
    with pytest.raises(BadArgument, match=f"^out: .* holds a corpus with .*{named}"):
        prepare_shapes(corpus, **{**SMALL, **change})
    assert contents(corpus) == before


def test_a_folder_of_other_files_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BadArgument, match="holds files but no corpus, want a new or empty folder"):
        prepare_shapes(tmp_path, **SMALL)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        prepare_shapes(out, samples=3, captions=2, val=1, prompts=1)
        assert (out / "corpus.json").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, error):
    def fail(folder, arguments, tick):
        (folder / "train").mkdir()
        (folder / "train" / "shard.00000.mds").write_bytes(b"half")
        raise error

    monkeypatch.setattr(shapes, "write_corpus", fail)
    with pytest.raises(type(error)):
        prepare_shapes(tmp_path / "x", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_in_one_line(tmp_path, monkeypatch, capsys):
    def fail(folder, arguments, tick):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shapes, "write_corpus", fail)
    assert main(["shapes", "--out", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err == "python -m train.prepare: error: [Errno 28] No space left on device\n"


def test_two_writers_of_the_same_corpus_agree(corpus, tmp_path, monkeypatch):
    out = tmp_path / "x"
    write = shapes.write_corpus

    def other_writer_wins(folder, arguments, tick):
        result = write(folder, arguments, tick)
        if not out.exists():
            monkeypatch.setattr(shapes, "write_corpus", write)
            prepare_shapes(out, **SMALL)
        return result

    monkeypatch.setattr(shapes, "write_corpus", other_writer_wins)
    assert prepare_shapes(out, **SMALL) == json.loads((out / "corpus.json").read_text())
    assert contents(out) == contents(corpus)
    assert list(tmp_path.iterdir()) == [out]


def test_command_line(tmp_path, corpus):
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    assert main(["shapes", "--out", str(tmp_path / "x"), *flags]) == 0
    assert contents(tmp_path / "x") == contents(corpus)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--samples", "0"], "samples: got 0, want a whole number of at least 1"),
        (["--samples", "many"], "argument --samples: invalid int value: 'many'"),
        (["--captions", "7000"], "captions: got 7000, want at most samples, which is 6000"),
        (["--size", "16"], "size: got 16, want a whole number of at least 32"),
        (["--mix", "scene"], "argument --mix: got 'scene', want skill=share,skill=share,..."),
        (["--mix", "scenery=1"], "mix: got the skill 'scenery', want skills out of"),
        (["--out", "FILE"], "FILE is a file, want a folder"),
        (["--out", "FILE/inside"], "FILE is a file, want a folder"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_flags_give_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("")
    try:
        code = main(["shapes", "--out", "x", *flags])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert named in error
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


@pytest.mark.parametrize("argv", [[], ["shapes"], ["dots", "--out", "x"]])
def test_a_missing_or_unknown_command_gives_one_line(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["shapes", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("out", "samples", "captions", "size", "seed", "val", "prompts", "mix", "compression"):
        assert f"--{flag} " in text
