"""Building csrc on first use into torch's extension cache (TORCH_EXTENSIONS_DIR), once for each state of its inputs."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).resolve().parents[2] / "csrc"


def load(
    what: str,
    compiled: Sequence[str],
    included: Sequence[str],
    state: str,
    check_compiler: Callable[[], None],
    **flags: Any,
) -> None:
    """Load the ops of `compiled`, and build them first if this machine has not yet; ranks wait for one of them.

    Args:
        what: names the build, and the one line that says it is being made.
        compiled, included: files of csrc.
        state: what else the binary depends on, besides the files, torch, the flags and the kind of machine.
        check_compiler: raises when there is no compiler; called only if one is needed.
        flags: as of `torch.utils.cpp_extension.load`.
    """
    import fcntl

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where no GPU is found
    from torch.utils import cpp_extension

    name = f"sr_routing_{what.lower()}_{_digest(compiled, included, state, flags)}"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / name
    finished = folder / "finished"  # a build that was killed leaves a library that must not be loaded
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "building", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ranks wait here; the kernel frees it when its holder dies
        if finished.exists():
            torch.ops.load_library(str(folder / f"{name}.so"))
            return
        check_compiler()
        print(f"sr_kernels: building the {what} routing kernel, once (half a minute)", file=sys.stderr, flush=True)
        (folder / "lock").unlink(missing_ok=True)  # cpp_extension's own, which would outlive a killed holder for ever
        paths = [str(SOURCES / file) for file in compiled]
        path = os.environ.get("PATH", os.defpath)
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"  # ninja, if the venv is not activated
        try:
            cpp_extension.load(name, paths, build_directory=str(folder), is_python_module=False, **flags)
        finally:
            os.environ["PATH"] = path
        finished.touch()


def _digest(compiled: Sequence[str], included: Sequence[str], state: str, flags: dict[str, Any]) -> str:
    digest = hashlib.sha256(" ".join([torch.__version__, platform.machine(), repr(sorted(flags.items()))]).encode())
    for file in (*compiled, *included):
        digest.update((SOURCES / file).read_bytes())
    digest.update(state.encode())
    return digest.hexdigest()[:16]
