"""Keep a finished run's figures and pictures: `python -m bench.demo runs/demo-s3`, then `python -m bench.report`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import yaml

from bench import provenance


def main(argv: list[str] | None = None) -> int:
    """Command line; writes bench/results/demo.json, demo.png and demo-loss.png."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished training run")
    run = parser.parse_args(argv).run
    if not (run / "summary.json").is_file():
        parser.error(f"run: wanted the folder of a finished run, found no summary.json in {run}")
    summary = json.loads((run / "summary.json").read_text())
    provenance.RESULTS.mkdir(exist_ok=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    command = f"deepspeed train/run.py --preset {config['preset']} --strategy {config['strategy']}"
    kept = {**provenance.header(), "command": command, **summary}
    (provenance.RESULTS / "demo.json").write_text(json.dumps(kept, indent=1) + "\n")
    shutil.copy(run / "samples.png", provenance.RESULTS / "demo.png")
    shutil.copy(run / "loss.png", provenance.RESULTS / "demo-loss.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
