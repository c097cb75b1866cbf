"""The configuration from the command line: a YAML preset of train/configs, then --config files, then single flags.

Nothing here imports torch, so that --help and a mistyped flag answer at once.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from train.config import Config, ConfigError, ModelConfig, build_section

PRESET_FOLDER = Path(__file__).parent / "configs"
WEIGHTED = ("data.captions", "data.mix")


def presets() -> list[str]:
    """Names of the presets in train/configs."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="deepspeed train/run.py",
        exit_on_error=False,
        description="Train a diffusion transformer conditioned on every layer of a frozen LLM. With no flag but "
        f"--strategy it runs the embedded demo. Presets: {', '.join(presets())}.",
        epilog="Exit codes: 0 finished, 1 failed, 2 a setting cannot be used, 70 a rank stalled, 75 stopped by SIGTERM "
        "or SIGUSR1 with a checkpoint (start the same command again to continue), 130 interrupted without one.",
    )
    parser.add_argument("--config", action="config", help="a YAML file of settings, such as a run's config.yaml")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.add_class_arguments(Config, as_group=False)
    return parser


def parse(argv: list[str]) -> Config:
    """Configuration from flags: preset, then --config files, then single flags.

    Raises: ConfigError in one line; SystemExit after --help.
    """
    argv = list(argv)
    name = "demo"
    for i, word in enumerate(argv):
        if word == "--preset" and i + 1 < len(argv):
            name = argv[i + 1]
        elif word.startswith("--preset="):
            name = word.partition("=")[2]
    if name not in presets():
        raise ConfigError(f"preset: wanted one of {', '.join(presets())}, got {name!r}")
    for weighted in WEIGHTED:
        argv = _weights(argv, weighted)
    parser = _parser()
    known = {action.dest for action in parser._actions}
    for word in argv:
        flag = word.partition("=")[0]
        if re.match(r"--[a-z]", flag) and flag.removeprefix("--").replace("-", "_") not in known | {"help"}:
            near = difflib.get_close_matches(flag.removeprefix("--"), known, 1)
            hint = f", did you mean --{near[0]}?" if near else ", see --help"
            raise ConfigError(f"{flag}: unknown flag{hint}")
    try:
        namespace = parser.parse_args(["--config", str(PRESET_FOLDER / f"{name}.yaml"), *argv])
        values = parser.instantiate_classes(namespace).as_dict()
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error))) from None
    names = {f.name for f in fields(Config)}
    config = Config(**{k: build_section(k, v) for k, v in values.items() if k in names})
    validate(config)
    return config


def _weights(argv: list[str], name: str) -> list[str]:
    """The flags with every `--NAME A=1,B=2` as the JSON that jsonargparse reads. Raises: ConfigError."""
    result, flag = [], f"--{name}"
    words = iter(argv)
    for word in words:
        if word != flag and not word.startswith(f"{flag}="):
            result.append(word)
            continue
        text = next(words, "") if word == flag else word.removeprefix(f"{flag}=")
        if not text.lstrip().startswith("{"):
            try:
                pairs = [item.rpartition("=") for item in text.split(",")]
                text = json.dumps({key.strip(): float(weight) for key, _, weight in pairs})
            except ValueError:
                raise ConfigError(f"{name}: wanted NAME=WEIGHT,..., got {text!r}") from None
        result.append(f"{flag}={text}")
    return result


def _one_line(message: str) -> str:
    """jsonargparse's message in one line and in this project's form: NAME: wanted ..., got ..."""
    line = re.sub(r"[\s-]+", " ", message)
    if found := re.search(r'Parser key "([\w.]+)":? Expected a (.*)\. Got value: (.*)$', line):
        name, wanted, got = found.groups()
        if wanted.startswith("typing.Literal"):
            wanted = "one of " + wanted[wanted.index("[") + 1 : -1].replace("'", "")
        else:
            wanted = {"float": "a number", "int": "a whole number", "bool": "true or false"}.get(
                re.sub(r"<class '(\w+)'>", r"\1", wanted), wanted
            )
        return f"{name}: wanted {wanted}, got {got}"
    return line.strip()


def validate(config: Config) -> None:
    """Check every value that can be checked without loading anything. Raises: ConfigError."""

    def want(ok: bool, name: str, wanted: str) -> None:
        if not ok:
            value: Any = config
            for part in name.split("."):
                value = getattr(value, part)
            raise ConfigError(f"{name}: wanted {wanted}, got {value}")

    def positive(name: str, value: float | None) -> None:
        want(value is None or (math.isfinite(value) and value > 0), name, "a finite number above 0")

    def share(name: str, value: float, top: float = 1.0) -> None:
        want(math.isfinite(value) and 0 <= value <= top, name, f"a number from 0 to {top:g}")

    optim, flow, ev = config.optim, config.flow, config.eval
    for name, value in (
        ("steps", config.steps),
        ("stop_at", config.stop_at),
        ("batch_size", config.batch_size),
        ("micro_batch_size", config.micro_batch_size),
        ("log_every", config.log_every),
        ("checkpoint_every", config.checkpoint_every),
        ("keep_checkpoints", config.keep_checkpoints),
        ("optim.lr", optim.lr),
        ("optim.clip", optim.clip),
        ("flow.shift", flow.shift),
        ("flow.logit_std", flow.logit_std),
        ("text.max_tokens", config.text.max_tokens),
        ("data.image_size", config.data.image_size),
        ("data.shapes_captions", config.data.shapes_captions),
        ("eval.val_samples", ev.val_samples),
        ("eval.grid", ev.grid),
        ("eval.steps", ev.steps),
        ("eval.batch_size", ev.batch_size),
        ("guard.max_skipped", config.guard.max_skipped),
        *((f"model.{f.name}", getattr(config.model, f.name)) for f in fields(ModelConfig) if f.name != "size"),
    ):
        positive(name, value)
    for name, count in (
        ("seed", config.seed),
        ("keep_every", config.keep_every),
        ("optim.warmup_steps", optim.warmup_steps),
        ("text.cache_mb", config.text.cache_mb),
        ("data.workers", config.data.workers),
        ("data.shapes_samples", config.data.shapes_samples),
        ("eval.every", ev.every),
        ("eval.score", ev.score),
    ):
        want(count >= 0, name, "0 or more")
    for name, amount in (("guard.spike", config.guard.spike), ("guard.stall_seconds", config.guard.stall_seconds)):
        want(math.isfinite(amount) and amount >= 0, name, "a finite number of at least 0")
    want(
        math.isfinite(config.data.cache_gb) and config.data.cache_gb >= 0,
        "data.cache_gb",
        "a finite number of at least 0",
    )
    share("optim.weight_decay", optim.weight_decay)
    share("optim.ema", optim.ema)
    share("flow.prompt_drop", flow.prompt_drop)
    for name, weights in (("data.captions", config.data.captions), ("data.mix", config.data.mix)):
        good = all(key and math.isfinite(weight) and weight > 0 for key, weight in weights.items())
        want(good and bool(weights or name == "data.mix"), name, "names, each with a finite weight above 0")
    want(all(0 <= beta < 1 for beta in optim.betas), "optim.betas", "two numbers from 0 to below 1")
    want(math.isfinite(flow.logit_mean), "flow.logit_mean", "a finite number")
    want(math.isfinite(ev.guidance) and ev.guidance >= 1, "eval.guidance", "a finite number of at least 1")
    if config.data.shapes_samples:
        want(
            config.data.shapes_captions <= config.data.shapes_samples,
            "data.shapes_captions",
            f"at most data.shapes_samples={config.data.shapes_samples}",
        )
        want("://" not in config.data.path, "data.path", "a folder to write the shapes corpus to (data.shapes_samples)")
    else:
        for path in config.data.mix or [config.data.path]:
            _want_corpus("data.mix" if config.data.mix else "data.path", path, "train")
        if config.data.mix:
            _want_corpus("data.path", config.data.path, "val")
    if ev.prompts is not None and not Path(ev.prompts).is_file():
        raise ConfigError(f"eval.prompts: wanted a .txt or .jsonl file, found none at {ev.prompts!r}")


def _want_corpus(name: str, path: str, split: str) -> None:
    """Raises: ConfigError where a folder holds no such split, in one piece or by aspect buckets."""
    if "://" in path:
        if not re.fullmatch(r"s3://[^/]+(/.*)?", path):
            raise ConfigError(f"{name}: wanted a folder or s3://BUCKET/PREFIX, got {path}")
    elif not any(any((Path(path) / split).glob(pattern)) for pattern in ("index.json", "*x*/index.json")):
        raise ConfigError(
            f"{name}: wanted a folder with {split}/index.json, found none in {path!r}; "
            "`python -m train.prepare --help` tells how to make one"
        )


def fail(error: Exception) -> int:
    """Print the error once (on the first rank of a node) in one line; the exit code for a bad setting."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    else:
        time.sleep(3)  # the launcher ends all ranks soon after the first has ended: let that be the one that prints
    return 2
