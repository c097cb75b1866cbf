"""Checkpoints: a folder that is complete before it gets its name, then `latest`, replaced atomically.

DeepSpeed writes the sharded weights and optimiser; beside them each rank writes its share of the moving average.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch

from train.config import ConfigError
from train.distributed import Ranks
from train.engine import Ema

LATEST = "latest"


def _name(step: int) -> str:
    return f"step-{step:07d}"


def save(
    folder: Path, step: int, engine: deepspeed.DeepSpeedEngine, ema: Ema, ranks: Ranks, extra: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of `step` on all ranks and drop all but the newest `keep`. A collective call.

    extra: small values needed to continue (loader place, counters), the same on every rank.
    """
    final, partial = folder / _name(step), folder / f"partial-{_name(step)}"
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    client = {**extra, "step": step, "world": ranks.world}
    engine.save_checkpoint(str(folder), tag=partial.name, client_state=client, save_latest=False)
    torch.save({**ema.state_dict(), "zero": engine.zero_optimization_stage()}, partial / f"ema-rank{ranks.rank:05d}.pt")
    ranks.barrier()  # every rank's files are there
    if ranks.first:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        pointer = folder / f"{LATEST}.new"
        pointer.write_text(final.name + "\n")
        os.replace(pointer, folder / LATEST)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()
    return final


def newest(folder: Path) -> Path | None:
    """The checkpoint `latest` names; without a usable `latest`, the newest complete folder; None if there is none."""
    pointer = folder / LATEST
    if pointer.is_file() and (folder / pointer.read_text().strip()).is_dir() and pointer.read_text().strip():
        return folder / pointer.read_text().strip()
    return max(folder.glob("step-*"), default=None)


def load(path: Path, engine: deepspeed.DeepSpeedEngine, ema: Ema, ranks: Ranks) -> dict[str, Any]:
    """Restore weights, optimiser, schedule and average; the `extra` that was saved comes back, with its "step".

    Raises: ConfigError when it was saved on another number of ranks or at another ZeRO stage.
    """
    shard = path / f"ema-rank{ranks.rank:05d}.pt"
    ranks_saved = len(list(path.glob("ema-rank*.pt")))
    if ranks_saved != ranks.world or not shard.is_file():
        raise ConfigError(f"resume: {path} was saved on {ranks_saved} ranks, this run has {ranks.world}")
    average = torch.load(shard, map_location="cpu", weights_only=True)
    saved, stage = average["zero"], engine.zero_optimization_stage()
    if saved != stage:
        raise ConfigError(f"resume: {path} was saved at ZeRO stage {saved}, got --zero {stage}")
    loaded, client = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise ConfigError(f"resume: DeepSpeed could not load {path}")
    ema.load_state_dict(average)
    return client
