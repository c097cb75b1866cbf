"""What the ranks tell one another beside training."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from train.config import ConfigError
from train.distributed import Ranks, peak_flops
from train.guards import SILENT, Places

ROOT = Path(__file__).parent.parent.parent


def test_what_one_rank_cannot_do_no_rank_does(tmp_path):
    program = f"""
import sys, torch
from train.config import ConfigError
from train.distributed import Ranks
from train.run import leave
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path / "meet"}", rank=rank, world_size=2)
ranks = Ranks(rank, 2, rank, torch.device("cpu"))
def work():
    if rank == 1:
        raise ConfigError("text.llm: not here")
    return rank
try:
    ranks.together(work)
except ConfigError as error:
    print(error)
print(ranks.together(lambda: rank + 5))
torch.distributed.destroy_process_group()
leave(0)
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    assert [run.communicate()[0] for run in runs] == ["text.llm: not here\n5\n", "text.llm: not here\n6\n"]


def test_alone_it_is_a_plain_call(ranks_alone):
    assert ranks_alone.together(lambda: 3) == 3
    with pytest.raises(ConfigError, match="no"):
        ranks_alone.together(lambda: (_ for _ in ()).throw(ConfigError("no")))


def test_a_rank_that_tells_nothing_new_is_silent(monkeypatch):
    """Three ranks' places on one store: one tells, one stops, one never begins."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    first, second = (Places(Ranks(rank, 3, rank, torch.device("cpu"))) for rank in (0, 1))
    third = Places(Ranks(2, 3, 2, torch.device("cpu")))
    for places in (first, second, third):
        places.tell("data", 1)
    assert first.silent(10.0) is None
    first.tell("data", 2)
    second.tell("data", 2)
    assert first.silent(10.0 + SILENT) is None
    first.tell("data", 3)
    assert first.silent(11.0 + SILENT) == 2  # nothing new since 10
    late = Places(Ranks(0, 4, 0, torch.device("cpu")))  # waits for a rank that never begins
    assert late.silent(0.0) is None
    for places in (first, second, third):
        places.tell("data", 4)
    assert late.silent(1.0 + SILENT) == 3
    assert Places(Ranks(0, 1, 0, torch.device("cpu"))).silent(1e9) is None


def test_a_gpu_is_known_by_its_name_or_has_no_peak(monkeypatch):
    for name, peak in (("NVIDIA H200", 989.4e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12),
                       ("Somebody's Accelerator", None)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, n=name: n)
        assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None
