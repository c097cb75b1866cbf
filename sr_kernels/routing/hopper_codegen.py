"""What nvcc made of the Hopper kernel: registers, spills, instructions of every instance. Needs nvcc, but no GPU.

`python -m sr_kernels.routing.hopper_codegen` prints the table, and with a path writes it as JSON: the figures that
`tests/sr_kernels/test_hopper_codegen.py` holds the source to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sr_kernels.routing import build, hopper

INSTRUCTIONS = {  # SASS, by what they are held for
    "bulk_copies": r"UBLKCP",
    "remote_stores": r"STAS",
    "barrier_waits": r"SYNCS\.PHASECHK\S*TRYWAIT",
    "cluster_barriers": r"UCGABAR_WAIT",
    "mma_16": r"HMMA\.16816\.F32",
    "mma_8": r"HMMA\.1688\.F32",
    "shared_vector_loads": r"LDS\.128",
    "vector_stores": r"STG\.E\.EF\.128",
    "local_memory": r"(?:LDL|STL)\b",
    "global_fences": r"MEMBAR\S*\.GPU",
}


def nvcc() -> str | None:
    """The CUDA compiler: in CUDA_HOME, or on the path."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def version() -> str:
    """The compiler's version, as "13.0"."""
    text = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    assert found is not None, text
    return found[1]


def figures() -> tuple[dict[str, dict[str, int]], str]:
    """Per instance ("5 steps, 3 tiles"): registers, bytes of stack and spills, counts of INSTRUCTIONS; and warnings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "routing_hopper.cubin"
        source = build.SOURCES / "routing_hopper.cu"
        command = [str(nvcc()), *hopper.FLAGS, "-Xptxas", "-v", "-cubin", str(source), "-o", str(cubin)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([str(tool), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    usage = re.findall(
        r"Function properties for \S*route_kernelILi(\d)ELi(\d)E\S*\s+(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers",
        report,
    )
    code = dict(re.findall(r"Function : \S*route_kernelILi(\dELi\d)E\S*\n(.*?)(?=Function : |\Z)", sass, re.DOTALL))
    table = {}
    for steps, tiles, stack, stores, loads, registers in usage:
        body = code[f"{steps}ELi{tiles}"]
        counts = {name: len(re.findall(rf"\s{pattern}", body)) for name, pattern in INSTRUCTIONS.items()}
        resources = {"registers": int(registers), "stack": int(stack), "spills": int(stores) + int(loads)}
        table[f"{steps} steps, {tiles} tiles"] = resources | counts
    return dict(sorted(table.items())), "\n".join(line for line in report.splitlines() if "warning" in line.lower())


def main(arguments: list[str]) -> None:
    """Print the figures, and write them to the path given, if any."""
    table: dict[str, object] = {"nvcc": version(), **figures()[0]}
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
    print(rows)
    if arguments:
        Path(arguments[0]).write_text(f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
