"""What an index may hold, before anything is read by it."""

import copy
import json

import pytest

from train.config import ConfigError
from train.data import read_index
from train.data.index import inside


@pytest.fixture
def split(corpus, tmp_path):
    """A folder with a copy of the training split's index, and a function that changes it."""
    plain = json.loads((corpus / "train" / "index.json").read_text())

    def write(change=lambda index: None):
        index = copy.deepcopy(plain)
        change(index)
        (tmp_path / "index.json").write_text(json.dumps(index))
        return tmp_path

    return write


def test_a_good_index_is_summed_up(split):
    def twice(index):
        index["shards"].append(copy.deepcopy(index["shards"][0]))
        index["shards"][1]["raw_data"]["basename"] = "part/shard.00001.mds"

    size = json.loads((split() / "index.json").read_text())["shards"][0]["raw_data"]["bytes"]
    index = read_index(split(twice))
    assert (index.samples, index.shards, index.bytes, index.largest, index.hashed) == (80, 2, 2 * size, size, True)
    assert index.columns == {"image": "bytes", "caption": "str", "meta": "json"}


def test_missing_hashes_are_known(split):
    assert not read_index(split(lambda i: i["shards"][0]["raw_data"].update(hashes={}))).hashed


def put(*path):
    """A change of one value: put(key, key ..., value)."""
    *keys, last, value = path

    def change(index):
        for key in keys:
            index = index[key]
        index[last] = value

    return change


SHARD = ("shards", 0)
BAD = [
    (put("version", 1), "version: wanted 2, got 1"),
    (put("shards", []), "shards: wanted a list of at least one shard"),
    (put(*SHARD, "format", "json"), r"shards\[0\].format: wanted 'mds', got 'json'"),
    (put(*SHARD, "extra", 1), r"shards\[0\]: wanted an object of column_encodings"),
    (
        put(*SHARD, "column_encodings", ["pkl", "str", "json"]),
        r"shards\[0\].column_encodings: wanted bytes.* got 'pkl'",
    ),
    (put(*SHARD, "column_encodings", ["list[pkl]", "str", "json"]), "column_encodings"),
    (put(*SHARD, "column_encodings", ["ndarray:object", "str", "json"]), "column_encodings"),
    (put(*SHARD, "column_encodings", ["bytes"]), "as many names as encodings"),
    (put(*SHARD, "column_names", ["image", "text", "meta"]), "a column 'caption'"),
    (put(*SHARD, "column_names", ["image", "image", "caption"]), "different names"),
    (put(*SHARD, "compression", "br"), "compression: wanted null, zstd, gz or bz2"),
    (put(*SHARD, "compression", "zstd"), "zip_data: wanted one if compressed"),
    (put(*SHARD, "samples", -1), "samples: wanted a whole number"),
    (put(*SHARD, "samples", 10**9), "bytes: wanted at least 4,000,000,008"),
    (put(*SHARD, "samples", True), "samples: wanted a whole number"),
    (put(*SHARD, "size_limit", "all"), "size_limit"),
    (put(*SHARD, "raw_data", None), "raw_data: wanted an object of basename"),
    (put(*SHARD, "raw_data", "bytes", 1 << 40), r"raw_data.bytes: wanted a whole number"),
    (put(*SHARD, "raw_data", "hashes", {"sha256": "00"}), "hashes.sha256: wanted 64 digits"),
    (put(*SHARD, "raw_data", "hashes", {"sha256": 7}), "hashes.sha256: wanted hexadecimal digits"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_is_refused(split, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_index(split(change))
    assert str(caught.value).startswith("data.path: ")
    assert "index.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[", "[]", "3", "[" * 100_000, '{"version": 2}', '{"version": 2, "shards": [3]}'])
def test_what_is_no_index(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^data.path: .*index.json"):
        read_index(tmp_path)


OUTSIDE = [
    "../x.mds",
    "/etc/passwd",
    "a/../../x",
    "..",
    ".",
    "",
    "a//b",
    "a\\b",
    "c:x",
    "a\0b",
    "a\nb",
    "index.json",
    3,
    None,
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_the_folder(split, name):
    assert not inside(name)
    with pytest.raises(ConfigError, match=r"raw_data.basename: wanted a file name inside the folder, got "):
        read_index(split(put(*SHARD, "raw_data", "basename", name)))


def test_names_that_stay():
    assert all(map(inside, ["shard.00000.mds", "part-3/shard.00000.mds.zstd", ".hidden", "a b"]))


def test_a_link_that_leaves_the_folder_is_refused(split, tmp_path_factory):
    folder = split()
    name = json.loads((folder / "index.json").read_text())["shards"][0]["raw_data"]["basename"]
    (folder / name).symlink_to(tmp_path_factory.mktemp("elsewhere") / "x")
    with pytest.raises(ConfigError, match=f"{name} is a link that leads out of it"):
        read_index(folder)


def test_the_same_file_twice_is_refused(split):
    with pytest.raises(ConfigError, match=r"different files, got 'shard.00000.mds'"):
        read_index(split(lambda index: index["shards"].append(index["shards"][0])))
