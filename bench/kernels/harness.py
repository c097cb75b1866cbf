"""Timing for the kernel benchmarks: warm and interleaved with a copy on a CPU, cold by graph replay on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
TOKENS = (512, 4096, 8192, 32768) if CUDA else (512,)
ROUNDS = 20 if CUDA else 7
Run = Callable[[int], Any]  # one call of a contender on the i-th of its rotating inputs


def rotations(n_bytes: int) -> int:
    """How many inputs to rotate over so that none is found in a GPU's L2 cache; a CPU runs warm."""
    if not CUDA:
        return 1
    return max(1, -(-4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size // n_bytes))


def seconds_of_copy(source: Tensor, target: Tensor) -> float:
    """One timed copy on a CPU."""
    start = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - start


def graph_of(run: Run, n: int) -> torch.cuda.CUDAGraph:
    """A graph of `n` calls over rotating inputs, each run before: nothing is compiled under the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(n):
            run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(n):
            run(i)
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> None:
    graph.replay()
    torch.cuda.synchronize()


def measure(benchmark: Any, run: Run, n: int, n_bytes: int, source: Tensor) -> dict[str, float]:
    """Time `run` and a copy of `source` in turns; put the figures into the benchmark's extra_info.

    Args:
        run: the contender. n: number of rotating inputs. n_bytes: bytes that a call must move.
        source: what the copy copies: a tensor past every cache.

    Returns: {"ms", "gb_per_s", "copy_gb_per_s", "percent_of_copy"}, medians.
    """
    target, copies = torch.empty_like(source), []
    moved = 2 * source.numel() * source.element_size()
    if CUDA:
        calls = max(n, 8)
        graph = graph_of(lambda i: run(i % n), calls)
        copy_graph = graph_of(lambda i: target.copy_(source), 4)

        def setup() -> None:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            copy_graph.replay()
            stop.record()
            torch.cuda.synchronize()
            copies.append(start.elapsed_time(stop) / 4e3)

        benchmark.pedantic(_replay, args=(graph,), setup=setup, rounds=ROUNDS, warmup_rounds=2)
    else:
        calls = 1
        benchmark.pedantic(run, args=(0,), setup=lambda: copies.append(seconds_of_copy(source, target)), rounds=ROUNDS,
                           warmup_rounds=1)  # fmt: skip
    seconds = benchmark.stats.stats.median / calls
    copy = moved / statistics.median(copies)
    figures = {
        "ms": seconds * 1e3,
        "gb_per_s": n_bytes / seconds / 1e9,
        "copy_gb_per_s": copy / 1e9,
        "percent_of_copy": 100 * n_bytes / seconds / copy,
    }
    benchmark.extra_info.update(figures)
    return figures


def peak_over(run: Run, outputs: Callable[[Any], list[Tensor]]) -> int | None:
    """Bytes at the peak of one call beyond what was there before it and what it returns; None where unknown."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = outputs(run(0))
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in kept)
    try:  # Linux: reset the high-water mark of the resident set
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    kept = outputs(run(0))
    return max(0, _status("VmHWM") - before - sum(x.nbytes for x in kept))


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
