"""Settings that cannot be used: one line that names them, once, exit code 2, and nothing written."""

import pytest

BAD = {
    "unknown key": (["--modle.depth=2"], "--modle.depth: unknown flag"),
    "NaN learning rate": (["--optim.lr=nan"], "optim.lr: wanted a number, got nan"),
    "YAML's NaN": (["--optim.lr=.nan"], "optim.lr: wanted a finite number above 0, got nan"),
    "wrong layer count": (["--model.text_layers=7"], "text.llm: wanted 7 layers"),
    "missing file": (["--eval.prompts=/nowhere.txt"], "eval.prompts: wanted a .txt or .jsonl file"),
    "missing data": (["--data.path=/nowhere"], "data.path: wanted a folder with train/index.json"),
}


def check(run, message):
    assert run.wait() == 2, run.output
    assert len(run.errors) == 1, run.output
    assert run.errors[0].startswith("error: " + message)
    assert "Traceback" not in run.output
    assert not run.folder.exists()
    assert run.orphans() == []


@pytest.mark.parametrize("case", BAD)
def test_one_process_names_the_setting(launch, case):
    flags, message = BAD[case]
    check(launch("run", *flags), message)


@pytest.mark.parametrize("case", ["NaN learning rate", "wrong layer count"])
def test_two_ranks_name_the_setting_once(launch, case):
    """One that fails before torch is imported, one that fails with the process group open."""
    flags, message = BAD[case]
    check(launch("run", *flags, ranks=2), message)


def test_ranks_that_do_not_know_their_node_are_refused(launch_ranks):
    """Two ranks on a machine, each told that it is alone there: shared memory would collide."""
    alone = {"LOCAL_SIZE": "1", "LOCAL_RANK": "0"}
    first, second = launch_ranks("run", environments={0: alone, 1: {**alone, "LOCAL_RANK": "1"}})
    check(first, "LOCAL_RANK of LOCAL_WORLD_SIZE: wanted the same number of ranks on every node, in turn")
    assert second.wait() == 2
