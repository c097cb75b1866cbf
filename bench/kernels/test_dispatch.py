"""What a call of `route` costs beyond its bare kernel: checks, dispatcher, choice of backend; on a tiny input."""

import timeit

import pytest
import torch

from bench.kernels.harness import DEVICE
from sr_kernels import layer_stats, route
from sr_kernels.routing import launch

CALLS = 100


def bare_call(layers, weights, stats):
    """The launch itself: the C++ op on a CPU, the function that launches the Triton kernel on a GPU."""
    if DEVICE.type == "cuda":
        return lambda: launch.route(layers, weights, *stats, None, False)
    return lambda: torch.ops.sr_kernels.native_route(layers, weights, *stats, None, False)


@pytest.mark.parametrize("form", ["tensor", "list of 36"])
def test_dispatch(benchmark, record, form):
    hidden = torch.randn(36, 2, 64, device=DEVICE)
    weights = torch.full((2, 36), 1 / 36, device=DEVICE)
    stats = layer_stats(hidden)
    given = hidden if form == "tensor" else list(hidden)
    bare = bare_call([hidden] if form == "tensor" else given, weights, stats)
    assert torch.equal(route(given, weights, stats=stats), bare()[0])

    bare_seconds = []

    def before():  # in turns, so that drift hits both
        bare_seconds.append(timeit.timeit(bare, number=CALLS) / CALLS)

    benchmark.pedantic(
        lambda: [route(given, weights, stats=stats) for _ in range(CALLS)], setup=before, rounds=100, warmup_rounds=2
    )
    # the fastest round of each: what the code costs, not what else the machine did
    ours, theirs = benchmark.stats.stats.min / CALLS * 1e6, min(bare_seconds) * 1e6
    record(op="dispatch", contender=form, us=ours, bare_us=theirs, over_us=ours - theirs)
    benchmark.extra_info.update(us=ours, bare_us=theirs, over_us=ours - theirs)
