"""What a call of `route` costs beyond its bare kernel: checks, dispatcher, choice of backend; on a tiny input."""

import timeit
from unittest import mock

import pytest
import torch

from bench.kernels.harness import DEVICE
from sr_kernels import layer_stats, route
from sr_kernels.routing import launch

CALLS = 100


def bare_call(layers, weights, stats):
    """The kernel alone, on arguments that are ready: the C++ op on a CPU, Triton's launches on a GPU. Gives out."""
    if DEVICE.type != "cuda":
        return lambda: torch.ops.sr_kernels.native_route(layers, weights, *stats, None, False)[0]
    from triton.runtime.jit import JITFunction

    launches, run = [], JITFunction.run

    def recorded(kernel, *args, **kwargs):
        launches.append((kernel, args, kwargs))
        return run(kernel, *args, **kwargs)

    launch.route(layers, weights, *stats, None, False)  # the table of addresses is kept from here on
    with mock.patch.object(JITFunction, "run", recorded):
        out, _ = launch.route(layers, weights, *stats, None, False)

    def call():
        for kernel, args, kwargs in launches:
            run(kernel, *args, **kwargs)
        return out

    return call


@pytest.mark.parametrize("grad", [False, True], ids=["no gradient", "gradient"])
@pytest.mark.parametrize("form", ["tensor", "list of 36"])
def test_dispatch(benchmark, record, form, grad):
    hidden = torch.randn(36, 2, 64, device=DEVICE)
    weights = torch.full((2, 36), 1 / 36, device=DEVICE)
    stats = layer_stats(hidden)
    given = hidden if form == "tensor" else list(hidden)
    bare = bare_call([hidden] if form == "tensor" else given, weights, stats)
    assert torch.equal(route(given, weights, stats=stats), bare())
    weights.requires_grad_(grad)

    bare_seconds = []

    def before():  # in turns, so that drift hits both
        with torch.no_grad():
            bare_seconds.append(timeit.timeit(bare, number=CALLS) / CALLS)

    benchmark.pedantic(
        lambda: [route(given, weights, stats=stats) for _ in range(CALLS)], setup=before, rounds=100, warmup_rounds=2
    )
    # the fastest round of each: what the code costs, not what else the machine did
    ours, theirs = benchmark.stats.stats.min / CALLS * 1e6, min(bare_seconds) * 1e6
    contender = f"{form}, weights that require grad" if grad else form
    record(op="dispatch", contender=contender, us=ours, bare_us=theirs, over_us=ours - theirs)
    benchmark.extra_info.update(us=ours, bare_us=theirs, over_us=ours - theirs)
