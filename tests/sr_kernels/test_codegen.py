"""The codegen contract: what the compiler makes of every checked-in launch, held to `codegen.json`. Needs no GPU.

Regenerate with `python -m sr_kernels.routing.codegen tests/sr_kernels/codegen.json` and read the difference.
"""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sr_kernels.routing import codegen, launch
from sr_kernels.routing.codegen import Variant

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

RECORDED = json.loads(Path(__file__).with_name("codegen.json").read_text())
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}
DEFAULT = [v for v in codegen.contract() if v.arch == 90 or not v.rich]
REST = [v for v in codegen.contract() if v not in DEFAULT]
LIMITS = [  # the far corners of what the tiles hold, in every dtype
    Variant(kernel, arch, blocks, rich, dtype, layers=64, channels=channels, tokens=tokens, wide=wide)
    for kernel, arch, (blocks, rich, channels, tokens, wide), dtype in itertools.product(
        ("stats", "forward", "backward"),
        codegen.ARCHITECTURES,
        ((64, False, 2560, 8192, True), (64, True, 2000, 7, False), (1, True, 2000, 7, True)),
        (torch.bfloat16, torch.float16, torch.float32),
    )
    if not (kernel == "stats" and blocks > 1)
]


def promises(variant, figures):
    """What holds whatever the compiler's version: nothing spills, and the instructions meant are there."""
    assert figures["stack"] == 0
    assert "local_memory" not in figures
    if variant.kernel != "stats" and variant.blocks > 1:
        assert figures[TENSOR_CORES[variant.arch]] > 0
    if variant.channels % 8 == 0 and variant.dtype != torch.float32:
        assert "half_word_loads" not in figures
    if variant.kernel == "stats" or (variant.kernel == "forward" and variant.blocks == 1):
        assert figures["vector_loads"] > 0
    else:
        assert figures["async_loads"] > 0


@pytest.mark.parametrize(
    "variant", [*DEFAULT, *(pytest.param(v, marks=pytest.mark.slow) for v in REST)], ids=lambda v: v.name
)
def test_figures_are_those_on_file(variant):
    figures = codegen.figures(variant)
    promises(variant, figures)
    if triton.__version__ != RECORDED["triton"]:
        pytest.skip(f"the figures on file are of Triton {RECORDED['triton']}")
    assert figures == RECORDED[variant.name]


@pytest.mark.slow
@pytest.mark.parametrize("variant", LIMITS, ids=str)
def test_the_largest_tiles_do_not_spill(variant):
    promises(variant, codegen.figures(variant))


class NoDevice:
    """A driver that names a target and launches nothing."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def test_the_launches_compile_what_the_contract_compiles(monkeypatch):
    """Run the real launches up to the compiler: the same machine code as the contract's."""
    code = {}

    def compile_only(kernel, grid):
        def start(*args, **kwargs):
            code[kernel.__name__] = kernel.run(*args, grid=grid, warmup=True, **kwargs).asm["cubin"]

        return start

    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    monkeypatch.setattr(driver, "_active", NoDevice())
    tokens = 16
    for rich, blocks in itertools.product((False, True), (1, 24)):
        hidden = [torch.zeros(36, tokens, 2560, dtype=torch.bfloat16)]
        hidden = list(hidden[0].unbind()) if rich else hidden
        cu_seqlens = torch.arange(tokens + 1, dtype=torch.int32) if rich else None
        weights = torch.zeros((tokens, blocks, 36) if rich else (blocks, 36))
        stats = launch.layer_stats(hidden)
        out, _ = launch.route(hidden, weights, *stats, cu_seqlens, sumsq=rich)
        launch.route_backward(out, hidden, *stats, cu_seqlens)
        kernels = ("route_fma", "backward_fma") if blocks == 1 else ("route_dot", "backward_dot")
        for name, kind in zip(("stats", *kernels), ("stats", "forward", "backward"), strict=True):
            variant = Variant(kind, 90, blocks, rich, tokens=tokens)
            assert code[name] == codegen.compile_variant(variant).asm["cubin"], variant.name


def test_every_variant_is_on_file():
    assert set(RECORDED) == {"triton", *(v.name for v in codegen.contract())}
    # Four programs to a multiprocessor of 65,536 registers: at most 128 a thread where the forward has four warps.
    assert all(f["registers"] <= 128 for name, f in RECORDED.items() if "forward" in name and "sm_90" in name)
