"""What the compiler made of the Triton routing kernels: registers, spills, shared memory, instructions. Needs no GPU.

`python -m sr_kernels.routing.codegen` prints the table of the paper's shape, and with a path writes it as JSON: the
figures that `tests/sr_kernels/test_codegen.py` holds the checked-in launches to.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sr_kernels.routing import launch
from sr_kernels.routing import triton_kernels as kernels

ARCHITECTURES = (80, 90, 100)
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {"table": "*i64", "sample": "*i32", "cu_seqlens": "*i32"}
UNSPECIALISED = ("tokens", "eps")  # as in the kernels' decorators
INSTRUCTIONS = {  # SASS, by what they are held for
    "wgmma": r"HGMMA",
    "mma": r"HMMA",
    "tcgen05": r"UTCHMMA",
    "async_loads": r"LDGSTS\S*\.128",
    "vector_loads": r"LDG\S*\.128",
    "half_word_loads": r"LDG\S*\.U16",
    "local_memory": r"(?:LDL|STL)\b",
}


@dataclass(frozen=True)
class Variant:
    """One kernel as `launch.py` would start it. `rich`: tuple of layers, per-sample weights, row factors."""

    kernel: str  # stats, forward or backward
    arch: int
    blocks: int = 24
    rich: bool = False
    dtype: torch.dtype = torch.bfloat16
    layers: int = 36
    channels: int = 2560
    tokens: int = 8192
    wide: bool = False  # strides past 2^31

    @property
    def name(self) -> str:
        """The key of this variant in the file of figures."""
        parts = [self.kernel, NAMES[self.dtype], f"D{self.blocks}", "rich" if self.rich else "plain", f"sm_{self.arch}"]
        return " ".join(parts)


def _plan(v: Variant) -> tuple[Any, launch.Launch, dict[str, object]]:
    """Kernel, launch and compile-time arguments."""
    common = {"TUPLE": v.rich, "ALIGN": 16, **({} if v.rich else {"table": None})}
    if v.kernel == "stats":
        chosen = launch.stats_launch(v.channels)
        return kernels.stats, chosen, {**common, **launch.stats_constants(chosen, v.channels)}
    if v.kernel == "forward":
        chosen = launch.forward_launch(v.dtype, v.layers, v.blocks, v.channels, v.tokens, v.arch)
        constants = launch.forward_constants(
            chosen, v.dtype, v.layers, v.blocks, v.channels, per_sample=v.rich, sumsq=v.rich
        )
        absent = {} if v.rich else {"sample": None, "sumsq": None}
        return kernels.route_fma if v.blocks == 1 else kernels.route_dot, chosen, {**common, **absent, **constants}
    samples = 16 if v.rich else 1
    chosen = launch.backward_launch(v.dtype, v.layers, v.blocks, v.channels, v.tokens, samples, v.arch)
    constants = launch.backward_constants(chosen, v.layers, v.blocks, v.channels, per_sample=v.rich)
    absent = {} if v.rich else {"cu_seqlens": None}
    return kernels.backward_fma if v.blocks == 1 else kernels.backward_dot, chosen, {**common, **absent, **constants}


def compile_variant(v: Variant) -> Any:
    """Compile one variant ahead of time; arguments are specialised as the launcher would for aligned tensors."""
    kernel, chosen, constants = _plan(v)
    names = kernel.arg_names
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("hidden", "out", "grad"):
            signature[name] = "*" + NAMES[v.dtype]
        elif name in ("tokens", "channels") or name.startswith("stride"):
            signature[name] = "i64" if v.wide and name.startswith("stride") else "i32"
        else:
            signature[name] = "fp32" if name == "eps" else POINTERS.get(name, "*fp32")
    aligned = [i for i, name in enumerate(names) if signature[name] != "constexpr" and name not in UNSPECIALISED]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", v.arch, 32), options=chosen.options())


def _tool(*arguments: str) -> str:
    return subprocess.run([str(BIN / "cuobjdump"), *arguments], capture_output=True, text=True, check=True).stdout


def figures(v: Variant) -> dict[str, int]:
    """Registers, bytes of stack (spills), bytes of shared memory, and counts of the instructions of INSTRUCTIONS."""
    compiled = compile_variant(v)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("-res-usage", file.name))
        sass = _tool("-sass", file.name)
    assert usage is not None, "cuobjdump gave no resource usage"
    counts = Counter({name: len(re.findall(rf"\s{pattern}", sass)) for name, pattern in INSTRUCTIONS.items()})
    # How many vector loads a warp has asked for by the time the first sum needs one.
    before, found, _ = sass.partition("FFMA")
    if found and not counts["async_loads"]:
        counts["loads_in_flight"] = len(re.findall(INSTRUCTIONS["vector_loads"], before))
    resources = {"registers": int(usage[1]), "stack": int(usage[2]), "shared": compiled.metadata.shared}
    return resources | {name: n for name, n in counts.items() if n}


def contract() -> list[Variant]:
    """The variants whose figures are checked in: the paper's shape, both forms."""
    return [
        Variant(kernel, arch, blocks, rich)
        for arch in ARCHITECTURES
        for rich in (False, True)
        for kernel, blocks in (("stats", 1), ("forward", 1), ("forward", 24), ("backward", 1), ("backward", 24))
    ]


def main(arguments: list[str]) -> None:
    """Print the figures, and write them to the path given, if any."""
    table: dict[str, object] = {"triton": triton.__version__}
    for variant in contract():
        table[variant.name] = figures(variant)
        print(f"{variant.name:32} {table[variant.name]}")
    if arguments:
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
        Path(arguments[0]).write_text(f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
