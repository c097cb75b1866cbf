"""The Hopper kernel's codegen contract: what nvcc makes of every instance, held to `hopper_codegen.json`. Needs no GPU.

Regenerate with `python -m sr_kernels.routing.hopper_codegen tests/sr_kernels/hopper_codegen.json`; read the difference.
"""

import json
from pathlib import Path

import pytest

from sr_kernels.routing import hopper_codegen

pytestmark = pytest.mark.skipif(hopper_codegen.nvcc() is None, reason="no nvcc")

RECORDED = json.loads(Path(__file__).with_name("hopper_codegen.json").read_text())


@pytest.fixture(scope="module")
def built():
    return hopper_codegen.figures()


def test_no_warning_no_spill_and_the_instructions_that_are_meant(built):
    table, warnings = built
    assert warnings == ""
    assert set(table) == {f"{steps} steps, {tiles} tiles" for steps in range(1, 7) for tiles in (1, 3)}
    for name, figures in table.items():
        steps, tiles = int(name[0]), int(name[9])
        assert figures["registers"] <= 65536 // 384 // 8 * 8, name  # 384 threads share them
        assert figures["stack"] == figures["spills"] == figures["local_memory"] == 0, name
        assert figures["bulk_copies"] > 0, name
        assert figures["remote_stores"] > 0, name
        assert figures["barrier_waits"] > 0, name
        # The blocks meet by barriers in shared memory; a cluster barrier with its fence stands at the start alone.
        assert figures["cluster_barriers"] == figures["global_fences"] == 1, name
        # One pass over four tiles of 16 channels, fully unrolled.
        assert figures["mma_16"] == 4 * tiles * (steps // 2), name
        assert figures["mma_8"] == 4 * tiles * (steps % 2), name
        assert figures["vector_stores"] == 2 * tiles, name


def test_figures_are_those_on_file(built):
    if hopper_codegen.version() != RECORDED["nvcc"]:
        pytest.skip(f"the figures on file are of nvcc {RECORDED['nvcc']}")
    assert {"nvcc": RECORDED["nvcc"], **built[0]} == RECORDED
