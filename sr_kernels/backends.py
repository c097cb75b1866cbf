"""The choice of backend: an argument, else an environment variable, else the default of the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TypeAlias

# None when a backend can run here, else the reason why not; or a function that finds out, called only if it matters
Reason: TypeAlias = "str | Callable[[], str | None] | None"


def choose(requested: str | None, variable: str, usable: Mapping[str, Reason], where: str) -> str:
    """Name the backend to run.

    Args:
        requested: the caller's `backend=`; None leaves it to `variable`, then to the first usable one.
        variable: name of the environment variable that overrides the default.
        usable: backend name -> `Reason`, in order of preference.
        where: what the backend is for, for the error's text ("routing on cpu").

    Raises: ValueError for an unknown name, RuntimeError for one that cannot run here.
    """
    name = requested or os.environ.get(variable) or None
    if name is None:
        return next(candidate for candidate, reason in usable.items() if _find(reason) is None)
    source = "backend" if requested else variable
    if name not in usable:
        raise ValueError(f"{source}: wanted one of {', '.join(usable)}, got {name!r}")
    if (reason := _find(usable[name])) is not None:
        raise RuntimeError(f"{source}: {name!r} cannot run {where}: {reason}")
    return name


def _find(reason: Reason) -> str | None:
    return reason() if callable(reason) else reason
