"""One process to many: what the launchers leave unset, and the process group."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from train.config import ConfigError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among the others, and its device."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    nodes: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """One line to stdout, from rank 0."""
        if self.first:
            print(line, flush=True)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], Result], *errors: type[Exception]) -> Result:
        """`work()`, which calls no other rank. Raises: ConfigError, or one of `errors`, on all ranks where one does."""
        result: Result | None = None
        wrong: Exception | None = None
        try:
            result = work()
        except (ConfigError, *errors) as error:
            wrong = type(error)(str(error))  # without its cause, which may not travel
        if found := [error for error in self.gather(wrong) if error is not None]:
            raise found[0]
        return cast("Result", result)


def start(timeout_seconds: float = 1800.0) -> Ranks:
    """Set what is missing for a single process, tell streaming how many ranks share a node, open the process group.

    timeout_seconds: how long a collective call waits for the other ranks; 0 for ever.

    Raises: ConfigError on all ranks when the nodes have different numbers of them, or do not number them in turn.
    """
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    local_world = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    os.environ["LOCAL_WORLD_SIZE"] = str(local_world)  # streaming reads this one; DeepSpeed's launcher sets LOCAL_SIZE
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its collectives for CPUs are compiled at the first start: a kill there leaves a lock that all later starts wait
    # for, a kill later on 69 MB of shared memory a rank. gloo does without both.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=timeout_seconds or 1e6))
    world = int(os.environ["WORLD_SIZE"])
    ranks = Ranks(int(os.environ["RANK"]), world, local_rank, device, max(1, world // local_world))
    places = ranks.gather((local_rank, local_world))
    if places != [(rank % local_world, local_world) for rank in range(world)] or world % local_world:
        got = ", ".join(f"{place} of {size}" for place, size in places)
        raise ConfigError(
            f"LOCAL_RANK of LOCAL_WORLD_SIZE: wanted the same number of ranks on every node, in turn, got {got}"
        )
    return ranks


ALARM = "semantic-routing/alarm"  # a key of the process group's store: there when some rank cannot go on


def sound_alarm() -> bool:
    """Tell all ranks that this one cannot go on, without a collective; whether it is the first to say so."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add(ALARM, 1) == 1
    except RuntimeError:  # the rank that keeps the store is gone, and has said why
        return False


class Alarm:
    """Listens for `sound_alarm` on a connection of its own, for a thread beside the one that trains."""

    def __init__(self) -> None:
        self._store = dist.distributed_c10d._get_default_store().clone()

    def sounds(self) -> bool:
        """Whether a rank cannot go on. Raises: RuntimeError when the rank that keeps the store is gone."""
        return bool(self._store.check([ALARM]))


# dense bf16 (the makers' data sheets, without sparsity), by what the device's name holds, the more exact names first
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a known GPU; None for any other device, which then has no MFU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is the faster type there: any GPU since Ampere, and CPUs with bf16 dot products."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    with open("/proc/cpuinfo") as f:
        flags = next((set(line.split()) for line in f if line.startswith("flags")), set())
    return bool(flags & {"avx512_bf16", "amx_bf16"})
