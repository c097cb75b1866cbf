"""Ranks that die: the others end soon, nothing is left behind, the next run starts."""

from tests.faults.conftest import STOP, losses


def test_a_killed_rank_ends_the_run_and_the_next_one_starts(launch):
    """kill -9 of one of two ranks mid-step, then a restart on the same machine."""
    flags = ("--zero=1", "--checkpoint_every=2")
    run = launch("run", *flags, "--steps=100000", ranks=2)
    run.at_step(3)
    run.rank(1).kill()
    assert run.wait(STOP) != 0
    assert run.orphans() == []
    before = max(losses(run.folder))
    again = launch("run", *flags, f"--steps={before + 2}", ranks=2).finish()
    assert f"{before + 2}/{before + 2}" in again.output
    assert "resume " in again.output
    assert again.orphans() == []


def test_a_killed_rank_ends_the_others_without_a_launcher(launch_ranks):
    """Across nodes no launcher sees the death: the collective itself must fail, not wait."""
    first, second = launch_ranks("run", "--steps=100000", "--zero=2")
    first.at_step(2)
    second.rank(1).kill()
    assert first.wait(STOP) != 0
    assert first.orphans() == [] == second.orphans()
