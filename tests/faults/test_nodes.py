"""Two nodes: two network namespaces joined by a cable, each with its own shared memory and data.

They share the folder of the run, and /tmp as nodes do whose TMPDIR is on a shared file system. Both run the launcher as
the README says for nodes without ssh.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import STOP, free_port, losses

# In its own mount namespace: private shared memory, and the node's own copy of the data under the common path.
ENTER = 'mount -t tmpfs -o size=1g tmpfs /dev/shm && mount --bind "$1" "$2" && shift 2 && exec "$@"'


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def cable():
    """Names of two network namespaces, each with an interface `node0` or `node1`, 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "mount"))):
        pytest.skip("network namespaces need root, iproute2 and util-linux")
    names = [f"semantic-routing-{os.getpid()}-{i}" for i in range(2)]
    made = []
    try:
        for name in names:
            done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces: {done.stderr.strip()}")
            made.append(name)
        ip("-n", names[0], "link", "add", "node0", "type", "veth", "peer", "name", "node1", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", f"node{i}")
            ip("-n", name, "link", "set", f"node{i}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)


@pytest.fixture
def launch_nodes(cable, start, tiny_flags, corpus, tmp_path):
    """A function (name, *flags) -> the Run of each of the two nodes, one rank a node, --out tmp_path / name."""
    hosts = tmp_path / "hosts"
    hosts.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")

    def begin(name, *flags):
        port = free_port()
        runs = []
        for node, space in enumerate(cable):
            own = tmp_path / f"node{node}"
            shutil.rmtree(own, ignore_errors=True)
            shutil.copytree(corpus, own / "data")
            inside = ["ip", "netns", "exec", space, "unshare", "-m", "sh", "-c", ENTER, "sh", own / "data", corpus]
            launcher = [Path(sys.executable).parent / "deepspeed", "--hostfile", hosts, "--no_ssh"]
            launcher += ["--node_rank", node, "--master_addr", "10.77.0.1", "--master_port", port]
            flags_ = [*tiny_flags, f"--out={tmp_path / name}", *flags]
            variables = {"GLOO_SOCKET_IFNAME": f"node{node}"}
            runs.append(start([*inside, *launcher, "train/run.py", *flags_], tmp_path / name, variables))
        return runs

    return begin


def test_two_nodes_train_as_one_node_with_two_ranks(launch_nodes, launch):
    flags = ("--strategy=s3", "--zero=2", "--steps=4", "--optim.lr=0.01", "--data.workers=1")
    nodes = launch_nodes("nodes", *flags)
    for run in nodes:
        run.finish()
        assert run.orphans() == []
    alone = launch("alone", *flags, ranks=2).finish()
    assert "x 2 ranks on 2 nodes;" in nodes[0].output
    assert "x 2 ranks;" in alone.output
    two, one = losses(nodes[0].folder), losses(alone.folder)
    assert list(two) == [1, 2, 3, 4]
    assert all(math.isclose(two[step], one[step], rel_tol=1e-6) for step in one), (two, one)


def test_a_node_that_dies_ends_the_other(launch_nodes):
    """kill -9 of everything on one node, its launcher too: the other learns it from the network alone."""
    first, second = launch_nodes("run", "--zero=2", "--steps=100000")
    first.at_step(2)
    second.kill()
    assert first.wait(STOP) != 0
    assert first.orphans() == []
