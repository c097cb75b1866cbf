"""Write the measured tables into the READMEs, and the roofline picture: `python -m bench.report`.

A README holds a table between `<!-- NAME -->` and `<!-- /NAME -->`; this replaces what stands there by what the JSON
files under bench/results say. `--check` changes nothing and fails where they differ.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import tables
from bench.provenance import RESULTS

ROOT = Path(__file__).parent.parent
READMES = (ROOT / "README.md", ROOT / "sr_kernels" / "routing" / "README.md")
ONE_TABLE = {  # a file each, or one a device
    "demo": tables.demo_table,
    "prepare": tables.prepare_table,
    "checkpoint": tables.checkpoint_table,
    "throughput": tables.throughput_table,
    "projection": tables.projection_table,
}


def read(pattern: str) -> list[dict[str, Any]]:
    """The results whose files have such names, in the names' order."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def kernel_results() -> list[dict[str, Any]]:
    """The newest kernel benchmark of every device that has routing's rows."""
    newest: dict[str, dict[str, Any]] = {}
    for result in read("kernels-*.json"):
        if not any(row.get("flops_per_byte") for row in result["results"]):
            continue
        if result["date"] >= newest.get(result["device"], result)["date"]:
            newest[result["device"]] = result
    return list(newest.values())


def roofline(results: Sequence[dict[str, Any]], path: Path) -> None:
    """A PNG: achieved arithmetic over arithmetic intensity, with each device's measured copy bandwidth as the roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(results), figsize=(7 * len(results), 4.5), layout="constrained", squeeze=False
    )
    for axis, result in zip(axes[0], results, strict=True):
        rows = [row for row in result["results"] if row.get("flops_per_byte")]
        for name in dict.fromkeys(row["contender"] for row in rows):
            mine = [row for row in rows if row["contender"] == name]
            intensity = [row["flops_per_byte"] for row in mine]
            rate = [row["flops_per_byte"] * row["gb_per_s"] for row in mine]
            axis.plot(intensity, rate, "o" if name in ("triton", "native") else "x", label=name)
        copy = max(row["copy_gb_per_s"] for row in rows)
        ends = [min(row["flops_per_byte"] for row in rows) / 2, max(row["flops_per_byte"] for row in rows) * 2]
        axis.plot(ends, [copy * end for end in ends], "k-", label=f"copy bandwidth, {copy:.0f} GB/s")
        axis.set(
            xscale="log", yscale="log", xlabel="flops a byte that must move", ylabel="GFLOP/s", title=result["device"]
        )
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def sections() -> dict[str, str]:
    """Every table there is a result for, by the name in the READMEs' marks."""
    found = {}
    for name, one in ONE_TABLE.items():
        if results := read(f"{name}*.json"):
            found[name] = "\n\n".join(map(one, results))
    if kernels := kernel_results():
        found["kernels"] = "\n\n".join(map(tables.kernel_table, kernels))
    if overhead := read("overhead-*.json"):
        parts = [tables.counted_table(overhead[0])]
        for result in overhead:
            parts += [tables.overhead_table(result), *([tables.factor_table(result)] if result["factors"] else [])]
        found["overhead"] = "\n\n".join(parts)
    return found


def fill(text: str, found: dict[str, str]) -> str:
    """The README's text with every marked table replaced; a mark without a result stays as it is."""
    for name, content in found.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.S
        )
    return text


def main(argv: list[str] | None = None) -> int:
    """Command line; 1 if --check finds a README that does not say what the results say."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a README is out of date")
    check = parser.parse_args(argv).check
    found, stale = sections(), []
    for path in READMES:
        text = path.read_text()
        if fill(text, found) != text:
            stale.append(path)
            if not check:
                path.write_text(fill(text, found))
    if check:
        for path in stale:
            print(f"{path.relative_to(ROOT)}: not what bench/results says; run python -m bench.report", file=sys.stderr)
        return int(bool(stale))
    if kernels := kernel_results():
        roofline(kernels, RESULTS / "roofline.png")
    print(f"wrote {', '.join(found) or 'nothing'}; changed {', '.join(p.name for p in stale) or 'no file'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
