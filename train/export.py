"""A checkpoint as a diffusers pipeline folder: `python -m train.export RUN_OR_CHECKPOINT OUT`.

Takes a run's folder (its newest checkpoint, or the one `latest` names) or one checkpoint, whatever ranks and ZeRO stage
wrote it, on one process without a GPU. The hashes are verified first; a broken checkpoint is refused by name. The LLM
and the VAE are those of the run's configuration, and are saved along.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from sr_model import DiT, FuseDiT
from train import checkpoint
from train.assemble import load_codec, load_encoder
from train.config import ConfigError, from_plain
from train.distributed import Ranks
from train.evaluate import make_pipeline
from train.flags import fail

WEIGHTS = ("ema", "master")


def locate(source: Path) -> Path:
    """The checkpoint that a run's folder, its `checkpoints` or a checkpoint itself stands for, verified.

    Raises: ConfigError naming the file that is missing or broken.
    """
    if (source / checkpoint.STATE).is_file() or (source / checkpoint.MANIFEST).is_file():
        path = source
    else:
        folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
        found = checkpoint.candidates(folder)
        if not found:
            raise ConfigError(f"source: wanted a run or a checkpoint, found no step-* in {folder}")
        path = found[0]
    if broken := checkpoint.fault(path):
        raise ConfigError(f"source: {path.name} is not whole: {broken}")
    return path


def load_model(path: Path, weights: str = "ema") -> DiT | FuseDiT:
    """The model of a checkpoint with its averaged ("ema") or its last ("master") weights, in the run's dtype."""
    facts = json.loads((path / checkpoint.STATE).read_text())
    kind = FuseDiT if facts["model"]["strategy"] == "fusedit" else DiT
    with torch.device("meta"):
        model = kind(**facts["model"])
    dtype = getattr(torch, facts["dtype"])
    with checkpoint.opened(path, weights) as readers:
        state = {name: read().to(dtype) for name, read in readers.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def export(source: Path, out: Path, weights: str = "ema") -> Path:
    """Write the pipeline folder `out`, whole or not at all; the checkpoint it is from.

    Raises: ConfigError for a broken checkpoint, a folder that is not empty, an LLM or VAE that is not found.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out: wanted a new or empty folder, got {out}")
    path = locate(source)
    model = load_model(path, weights)
    config = from_plain(json.loads((path / checkpoint.STATE).read_text())["config"])
    alone, dtype = Ranks(0, 1, 0, torch.device("cpu")), next(model.parameters()).dtype
    pipe = make_pipeline(config, model, load_encoder(config, alone, dtype), load_codec(config, alone, dtype))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as partial:
        pipe.save_pretrained(Path(partial) / out.name)
        if out.exists():
            out.rmdir()
        (Path(partial) / out.name).rename(out)
    return path


def main(argv: list[str] | None = None) -> int:
    """Command line; 2 for what cannot be exported."""
    parser = argparse.ArgumentParser(
        prog="python -m train.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a run's folder, or one of its checkpoints/step-*")
    parser.add_argument("out", type=Path, help="folder to write; `python -m sr_model.sample OUT ...` draws from it")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="ema", help="the moving average (default), or the last step's weights"
    )
    arguments = parser.parse_args(argv)
    try:
        path = export(arguments.source.resolve(), arguments.out.resolve(), arguments.weights)
    except ConfigError as error:
        return fail(error)
    print(f"wrote {arguments.out} from {path}, weights: {arguments.weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
