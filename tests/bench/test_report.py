"""The READMEs' tables are what the results on file say."""

import json

import pytest

from bench import demo, provenance, report, tables
from bench.kernels import conftest as kernels

HEADER = {"device": "D", "python": "3", "torch": "2", "cuda": None, "commit": "c", "command": "x", "date": "2026-01-01"}


def test_the_readmes_are_up_to_date():
    assert report.main(["--check"]) == 0


def test_fill_replaces_only_what_stands_between_the_marks():
    text = "a\n<!-- demo -->\nold\n<!-- /demo -->\nb\n<!-- kernels -->\nkept\n<!-- /kernels -->\n"
    filled = report.fill(text, {"demo": "new | table"})
    assert filled == text.replace("old", "new | table")
    assert report.fill(filled, {"demo": "new | table"}) == filled


def test_a_kernel_row_compares_with_the_best_of_plain_torch():
    def row(contender, ms, **more):
        return {"name": f"test_forward[{contender}-L36-D24]", "op": "forward", "contender": contender, "ms": ms,
                "gb_per_s": 10.0, "percent_of_copy": 50.0, **more}  # fmt: skip

    rows = [row("native", 2.0, peak_percent=0.5), row("eager", 9.0), row("layernorm", 7.0)]
    rows.append({"name": "test_dispatch[tensor]", "op": "dispatch", "contender": "tensor", "us": 9.0, "bare_us": 5.5,
                 "over_us": 3.5})  # fmt: skip
    lines = tables.kernel_table({**HEADER, "results": rows}).splitlines()
    assert "| `route` of a tensor | 9.0 | 5.5 | 3.5 |" in lines
    line = lines[2]
    assert line == (
        "| forward | L36-D24 | 2.00 (native) | 10.0 | 50% | 9.0 / - / 7.0 | - | 3.5 x (layernorm) | 0.50% |"
    )


def test_each_of_our_kernels_for_a_shape_has_its_row():
    rows = [
        {"name": f"test_forward[{contender}-L36-D24]", "op": "forward", "contender": contender, "ms": ms,
         "gb_per_s": 10.0, "percent_of_copy": 50.0}
        for contender, ms in (("native", 2.0), ("triton", 4.0), ("eager", 8.0))
    ]  # fmt: skip
    lines = tables.kernel_table({**HEADER, "results": rows}).splitlines()
    assert lines[2] == "| forward | L36-D24 | 4.00 (triton) | 10.0 | 50% | 8.0 / - / - | - | 2.0 x (eager) | - |"
    assert lines[3] == "| forward | L36-D24 | 2.00 (native) | 10.0 | 50% | 8.0 / - / - | - | 4.0 x (eager) | - |"


def test_a_gradient_from_a_kept_norm_has_its_own_column_and_is_not_the_best():
    rows = [
        {"name": f"test_backward[{contender}-L36-D1]", "op": "backward", "contender": contender, "ms": ms,
         "gb_per_s": 10.0, "percent_of_copy": 50.0}
        for contender, ms in (("native", 5.0), ("layernorm", 10.0), ("saved", 2.0))
    ]  # fmt: skip
    lines = tables.kernel_table({**HEADER, "results": rows}).splitlines()
    assert "| eager / compile / layernorm, ms | plain, xhat kept, ms | ahead of the best from hidden |" in lines[0]
    assert lines[2] == "| backward | L36-D1 | 5.00 (native) | 10.0 | 50% | - / - / 10.0 | 2.0 | 2.0 x (layernorm) | - |"


def test_a_run_of_some_kernel_benchmarks_keeps_the_others_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    routing = {"name": "test_forward[native]", "op": "forward", "flops_per_byte": 1.0, "ms": 3.0}
    dispatch = {"name": "test_dispatch[tensor]", "op": "dispatch", "us": 9.0}
    first = kernels.keep({**HEADER}, [routing, dispatch])
    later = {**HEADER, "command": "x -k dispatch", "date": "2026-01-01T01"}
    assert kernels.keep(later, [{**dispatch, "us": 7.0}]) == first
    kept = json.loads(first.read_text())
    assert kept["results"] == [routing, {**dispatch, "us": 7.0}]
    assert kept["command"] == "x; x -k dispatch"
    other = kernels.keep({**HEADER, "commit": "d", "date": "2026-01-01T02"}, [dispatch])
    assert other != first
    assert json.loads(first.read_text()) == kept
    assert report.kernel_results() == [kept]  # the newer file has no row of routing


def test_the_demo_table_has_a_column_a_split():
    single = {"count": 4, "color": 1.0, "shape": 0.5}
    skills = {"attribute": {"count": 4, "passed": 0.25}, "scene": {"count": 0, "passed": None}}
    result = {
        **HEADER, "steps": 10, "training_seconds": 5.0, "images_per_s": 64.0, "val_loss": [1.5, 0.1],
        "seconds_by_part": {"data": 1.0, "dit": 3.0},
        "score": {"train-distribution": {"single": single, "skills": skills}},
    }  # fmt: skip
    lines = tables.demo_table(result).splitlines()
    assert "| where the time goes | data 25.0%, dit 75.0% |" in lines
    assert "| validation loss | 1.5000 to 0.1000 (0.067 of the first) |" in lines
    assert "| single object: shape | 50% of 4 |" in lines
    assert "| attribute | 25% of 4 |" in lines
    assert "| scene | - |" in lines


def test_keeping_a_run_needs_a_finished_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path / "results")
    with pytest.raises(SystemExit):
        demo.main([str(tmp_path)])
    assert "found no summary.json" in capsys.readouterr().err
    for name in ("samples.png", "loss.png"):
        (tmp_path / name).write_bytes(b"png")
    (tmp_path / "summary.json").write_text('{"steps": 3}')
    (tmp_path / "config.yaml").write_text("{preset: demo, strategy: s3}")
    assert demo.main([str(tmp_path)]) == 0
    kept = json.loads((tmp_path / "results" / "demo.json").read_text())
    assert kept["steps"] == 3
    assert kept["torch"]
    assert kept["command"] == "deepspeed train/run.py --preset demo --strategy s3"
    assert (tmp_path / "results" / "demo.png").read_bytes() == b"png"
