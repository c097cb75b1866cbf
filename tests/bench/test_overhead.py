"""Table 4's benchmark at a tiny size: every part runs, and its tables say what was measured."""

import pytest
import torch

from bench import overhead, tables
from bench.setting import Setting, dit, language_model, pipeline, tokenizer

TINY = Setting(
    "tiny",
    {"depth": 2, "hidden_size": 32, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2, "mlp_size": 48, "text_dim": 24,
     "text_layers": 3},
    {"intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    side=8,
    tokens=(3, 6),
    steps=2,
)  # fmt: skip


def test_a_measurement_compares_with_b1_and_with_the_plain_path():
    result = overhead.measure(TINY, ["b1", "s3"], 2, True, False, torch.device("cpu"))
    assert [(row["strategy"], row["tokens"]) for row in result["rows"]] == [
        ("b1", 3), ("s3", 3), ("b1", 6), ("s3", 6)
    ]  # fmt: skip
    assert all(row["over_base"] == 1 for row in result["rows"] if row["strategy"] == "b1")
    for strategy in ("b1", "s3"):
        steps = [row for row in result["factors"] if row["strategy"] == strategy]
        assert [row["factor"] for row in steps] == ["plain", "unpad", "fuse", "fold", "cache"]
        counted = [row["flops"] for row in steps]
        assert counted == sorted(counted, reverse=True)  # no factor adds work


def test_a_factor_runs_blocks_as_they_were_written():
    pipe = pipeline(
        dit("b2", TINY, "cpu", torch.float32), language_model(TINY, torch.device("cpu"), torch.float32), tokenizer()
    )
    block, compiled = pipe.transformer.blocks[0], object()
    block.forward = compiled
    with overhead.plain_blocks(pipe):
        assert block.forward.__func__ is type(block).forward
    assert block.forward is compiled
    assert "forward" not in vars(pipe.transformer.blocks[1])


def test_a_ratio_is_taken_round_by_round():
    row = overhead.summary([2.0, 6.0, 5.0], [1.0, 2.0, 5.0])
    assert row["over_base"] == 2.0  # of 2, 3 and 1
    assert row["seconds"] == 5.0
    assert tables.over({"over_base": 1.075, "over_base_quartiles": [1.07, 1.08]}) == "+7.5% (+7.0 to +8.0)"


def test_rounds_are_checked(capsys):
    with pytest.raises(SystemExit):
        overhead.main(["--rounds", "0"])
    assert "--rounds: wanted at least 1, got 0" in capsys.readouterr().err
