"""Recaptioning against a server on loopback that answers, refuses, errs and hangs."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter, StreamingDataset

from tests.train.prepare.chat_server import completion, digest, good, serving
from train.prepare.__main__ import main
from train.prepare.recaption import PROMPT

FORMATS = ("PNG", "JPEG", "WEBP")


def image(i):
    pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=FORMATS[i % 3])
    return file.getvalue()


IMAGES = [image(i) for i in range(14)]
NAMES = [digest(i) for i in IMAGES]


@pytest.fixture
def source(tmp_path):
    """12 samples in train, in three shards, and 2 in val."""
    folder = tmp_path / "source"
    for name, at in (("train", range(12)), ("val", range(12, 14))):
        with MDSWriter(
            out=str(folder / name), columns={"image": "bytes", "caption": "str"}, hashes=["sha256"], size_limit=1200
        ) as writer:
            for i in at:
                writer.write({"image": IMAGES[i], "caption": f"old {i}"})
    return folder


@pytest.fixture
def recaption(source, tmp_path, monkeypatch):
    """A function (server, *flags) -> exit code of the command; its output is tmp_path / "out"."""
    monkeypatch.setenv("OPENAI_API_KEY", "the key")

    def run(server, *flags):
        url = server if isinstance(server, str) else server.url
        return main(["recaption", f"--source={source}", f"--out={tmp_path / 'out'}", f"--base-url={url}", *flags])

    return run


def read(folder):
    return list(StreamingDataset(local=str(folder), shuffle=False, batch_size=1))


def answers(folder):
    return [json.loads(line) for path in sorted(folder.rglob("answers/*/*.jsonl")) for line in path.open()]


def quarantine(out):
    path = out / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_image_is_asked_once_and_its_answer_kept(recaption, tmp_path):
    with serving() as server:
        assert recaption(server, "--concurrency=3", "--model=m", "--max-tokens=77") == 0
        assert server.asked == dict.fromkeys(NAMES, 1)
        text = {"type": "text", "text": PROMPT}
        assert server.body["messages"][0]["content"][1] == text
        assert (server.body["model"], server.body["max_tokens"], server.body["temperature"]) == ("m", 77, 0.0)
        kind = server.body["messages"][0]["content"][0]["image_url"]["url"].partition(";")[0]
        assert kind in {"data:image/png", "data:image/jpeg", "data:image/webp"}
        assert server.headers["Authorization"] == "Bearer the key"
        assert recaption(server, "--concurrency=3", "--model=m", "--max-tokens=77") == 0  # finished: asks nothing
        assert server.asked == dict.fromkeys(NAMES, 1)
    found = read(tmp_path / "out" / "train") + read(tmp_path / "out" / "val")
    for i, sample in enumerate(found):
        assert sample == {"image": IMAGES[i], "caption": f"old {i}", "recaption": f"a caption of {NAMES[i]}"}
    kept = answers(tmp_path / "out")
    assert len(kept) == 14
    assert {(row["model"], row["finish_reason"], row["usage"]["total_tokens"]) for row in kept} == {
        ("served-model", "stop", 13)
    }
    report = json.loads((tmp_path / "out" / "recaption.json").read_text())
    assert report["counts"]["captioned"] == 14
    assert report["counts"]["completion_tokens"] == 14 * 3
    assert quarantine(tmp_path / "out") == []


def test_passing_errors_are_retried(recaption, tmp_path):
    failures = [(429, "{}"), (500, "oops"), (503, "")]

    def behave(image, attempt):
        at = NAMES.index(image) % 4
        return failures[attempt] if attempt < at else good(image, attempt)

    with serving(behave) as server:
        assert recaption(server) == 0
        assert server.asked == {name: 1 + i % 4 for i, name in enumerate(NAMES)}
    assert [s["recaption"] for s in read(tmp_path / "out" / "train")] == [f"a caption of {n}" for n in NAMES[:12]]
    assert quarantine(tmp_path / "out") == []


def test_a_sample_without_an_answer_keeps_its_caption_and_is_listed(recaption, tmp_path):
    odd = {
        0: (200, completion("")),
        1: (200, completion(None, refusal="I cannot")),
        2: (200, completion("half a", "content_filter")),
        3: (200, "{ not JSON"),
        4: (200, '{"choices": []}'),
        5: (400, '{"error": {"message": "image too large"}}'),
        6: ("hang", ""),
        7: (500, ""),
        8: (200, completion(["a", "list"])),
        9: (200, completion("a cut capt", "length")),
    }
    with serving(lambda image, n: odd.get(NAMES.index(image)) or good(image, n)) as server:
        assert recaption(server, "--retries=1", "--timeout=1") == 0
        assert [server.asked[NAMES[i]] for i in (0, 3, 5, 6, 7)] == [1, 1, 1, 2, 2]
    captions = [s["recaption"] for s in read(tmp_path / "out" / "train")]
    assert captions[:9] == [f"old {i}" for i in range(9)]
    assert captions[9:] == ["a cut capt", f"a caption of {NAMES[10]}", f"a caption of {NAMES[11]}"]
    rows = quarantine(tmp_path / "out")
    assert [row["reason"] for row in rows] == ["empty", "refused", "refused", *["failed"] * 6]
    details = [row["detail"] for row in rows]
    assert details[1:3] == ["I cannot", "content filter"]
    assert "not a chat completion" in details[3]
    assert "status 400" in details[5]
    assert "image too large" in details[5]
    assert details[6] == "timeout"
    assert "status 500" in details[7]
    report = json.loads((tmp_path / "out" / "recaption.json").read_text())
    assert report["quarantined"] == {"empty": 1, "refused": 2, "failed": 6}
    assert (report["counts"]["captioned"], report["counts"]["cut at max-tokens"]) == (5, 1)


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "OPENAI_API_KEY: .* answers 401"), (403, "OPENAI_API_KEY: .* answers 403"), (404, "model: .* answers 404")],
)
def test_an_endpoint_that_refuses_ends_the_command_at_once(recaption, capsys, status, message):
    with serving(lambda image, n: (status, '{"error": {"message": "no"}}')) as server:
        assert recaption(server, "--concurrency=2") == 1
        assert sum(server.asked.values()) <= 4  # those in flight
    errors = capsys.readouterr().err.strip().splitlines()
    assert re.search(f"error: {message}", errors[-1])


def test_an_unreachable_endpoint_ends_the_command(recaption, capsys, tmp_path):
    with serving() as server:
        url = server.url  # nobody listens once the server is closed
    assert recaption(url, "--retries=0") == 1
    assert re.search(r"error: base-url: http://127.0.0.1:\d+/v1/ cannot be reached", capsys.readouterr().err)
    with serving() as server:  # and with the right one it continues
        assert recaption(server) == 0
        assert server.asked == dict.fromkeys(NAMES, 1)


def test_an_endpoint_that_fails_again_and_again_ends_the_command_and_a_resume_asks_the_rest(recaption, capsys):
    first = NAMES[:3]  # the first shard: the failures are all in the second, which is not finished
    with serving(lambda image, n: good(image, n) if image in first else (500, "")) as server:
        assert recaption(server, "--retries=0", "--give-up=2", "--concurrency=1") == 1
        assert server.asked == dict.fromkeys(NAMES[:5], 1)
    assert "failed 2 times in a row: status 500" in capsys.readouterr().err
    with serving() as server:
        assert recaption(server) == 0
        assert server.asked == dict.fromkeys(NAMES[3:], 1)  # the failed ones again, the answered ones not


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt=@/nowhere"], "prompt: wanted a text or @FILE"),
        (["--concurrency=0"], "concurrency: wanted a number of at least 1, got 0"),
        (["--timeout=nan"], "timeout: wanted"),
        (["--column=a/b"], "column: wanted a name of letters"),
        (["--column=caption"], "column: wanted 'caption' not to be there"),
        (["--caption=text"], "caption: wanted the columns image and text"),
    ],
)
def test_a_bad_argument_is_one_line(recaption, capsys, tmp_path, flags, message):
    assert recaption("http://127.0.0.1:9/v1", *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_the_prompt_comes_from_a_file(recaption, tmp_path):
    (tmp_path / "prompt.txt").write_text("Say é.\n")
    with serving() as server:
        assert recaption(server, f"--prompt=@{tmp_path / 'prompt.txt'}") == 0
        assert server.body["messages"][0]["content"][1]["text"] == "Say é."
        assert recaption(server, "--prompt=other") == 2  # another question: another folder
