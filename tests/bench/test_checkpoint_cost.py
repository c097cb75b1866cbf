"""The cost of a checkpoint is split into parts of the save, and told beside a plain copy."""

import pytest

from bench import checkpoint, tables
from tests.bench.test_report import HEADER
from train.distributed import start


def test_the_parts_are_of_the_save(tmp_path):
    result = checkpoint.measure(tmp_path, 256, 2, start())
    cost = result["seconds_per_gb"]
    assert all(seconds > 0 for seconds in cost.values())
    assert set(cost) == {"save", "copy", "held", "verify", "load", *checkpoint.PARTS}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-0000003"]
    demo = checkpoint.demo_share(2.0)
    assert demo["hash_seconds"] == pytest.approx(2 * 2.0 * demo["bytes"] / 1e9)


def test_a_row_says_how_much_more_than_a_copy():
    cost = dict(copy=1.0, save=2.5, gather=0.2, write=1.0, flush=0.3, hash=0.8, held=0.3, verify=0.8, load=0.5)  # noqa: C408
    result = {**HEADER, "zero": 1, "bytes": 1.2e9, "rounds": 5, "seconds_per_gb": cost, "save_over_copy": 2.4,
              "save_over_copy_quartiles": [2.2, 2.6], "demo": None}  # fmt: skip
    lines = tables.checkpoint_table(result).splitlines()
    assert (
        lines[2] == "| 1.00 | 2.50 (2.40 of the copy, 2.20 to 2.60) | 0.20 / 1.00 / 0.30 / 0.80 | 0.30 | 0.80 + 0.50 |"
    )
    assert lines[4].startswith("1.20 GB, ZeRO 1, medians of 5 rounds; D; torch 2")
