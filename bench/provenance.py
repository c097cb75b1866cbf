"""Where and when a result was measured: kept with every result under bench/results."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """The GPU, or the CPU and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads"


def result_path(name: str) -> Path:
    """Where a benchmark's result is kept: one file a device."""
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", f"{name} {device_name()}".lower()) + ".json")


def header() -> dict[str, Any]:
    """What a result must carry to be read later."""
    root = Path(__file__).parents[1]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "device": device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "commit": git.stdout.strip(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
