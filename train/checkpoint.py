"""Checkpoints that exist or do not: whole tensors under hashes, voted on by all ranks, renamed into place.

A checkpoint holds each parameter's fp32 master, Adam moments and moving average whole, shared out over the ranks'
files, so that any number of ranks at any ZeRO stage can continue from it; and `state.json`: the configuration, the
loader's place, counters, versions. Saving: every rank writes into a partial folder, all vote, `manifest.json` (SHA-256
of every file) is written last, the folder gets its name, `latest` is replaced atomically. Finding: the manifest is
verified by all ranks together, the newest whole checkpoint is taken, a broken one is named. Neither holds more than
PART_BYTES of a rank's share in memory at a time; only a save in the background copies all of it first.

There is no generator state in it: all that is drawn is drawn from (seed, step, sample).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from functools import partial as bound
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.config import ConfigError
from train.disk import replace_text, sync
from train.distributed import Ranks
from train.engine import Ema, FullState

LATEST, MANIFEST, STATE = "latest", "manifest.json", "state.json"
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
PARAMETER_BYTES = 4 * len(KINDS)  # of all ranks' files, for each parameter
PART_BYTES = 2 << 30  # of one rank's file
VERSIONS = ("torch", "deepspeed", "mosaicml-streaming", "transformers", "diffusers", "safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the one before it is untouched."""


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by step, in order, whole or not; nothing else that lies there."""
    found = {int(m[1]): path for path in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d{7,})", path.name))}
    return dict(sorted(found.items()))


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def owners(state: FullState, world: int) -> dict[str, int]:
    """Which rank writes a parameter: the one with the least so far, the largest parameters first."""
    load, owner = [0] * world, {}
    for name in sorted(state.names, key=lambda n: (-state.numel(n), n)):
        owner[name] = load.index(min(load))
        load[owner[name]] += state.numel(name)
    return owner


def rounds(state: FullState, owner: dict[str, int]) -> list[list[str]]:
    """The parameters, cut so that in each round no rank has more than PART_BYTES to write (or one parameter)."""
    cut: list[list[str]] = [[]]
    load: dict[int, int] = {}
    for name, rank in owner.items():
        size = 4 * state.numel(name)
        if load.get(rank) and load[rank] + size > PART_BYTES:
            cut.append([])
            load = {}
        cut[-1].append(name)
        load[rank] = load.get(rank, 0) + size
    return cut


def _shares(engine: deepspeed.DeepSpeedEngine, ema: Ema, ranks: Ranks) -> Generator[tuple[str, int, dict[str, Tensor]]]:
    """What this rank writes, as CPU tensors: kind, number of the part, tensors by name.

    Each step of the iteration is a collective call: every tensor is gathered by all.
    """
    state = FullState(engine)
    owner = owners(state, ranks.world)
    for kind in KINDS:
        with ema.in_place_of_masters() if kind == "ema" else contextlib.nullcontext():
            for part, names in enumerate(rounds(state, owner)):
                share = {}
                for name in names:
                    value = state.get(name, "master" if kind == "ema" else kind)
                    if owner[name] == ranks.rank:
                        share[name] = value.detach().float().cpu().clone().contiguous()
                yield kind, part, share
                del share  # before the next are gathered


def _facts(step: int, engine: deepspeed.DeepSpeedEngine, ema: Ema, ranks: Ranks, extra: dict[str, Any]) -> str:
    """What STATE holds."""
    state = FullState(engine)
    facts = {
        **extra,
        "step": step,
        "world": ranks.world,
        "zero": engine.zero_optimization_stage(),
        "dtype": str(next(iter(state.parameters.values())).dtype).removeprefix("torch."),
        "model": {k: v for k, v in engine.module.config.items() if not k.startswith("_")},
        "adam_step": state.adam_step,
        "ema_steps": ema.steps,
        "schedule_step": engine.lr_scheduler.last_epoch,
        "versions": {package: version(package) for package in VERSIONS},
    }
    return json.dumps(facts, indent=1)


class _Folder:
    """A checkpoint's folder until it is whole. `begin` and `finish` are collective calls."""

    def __init__(self, folder: Path, step: int, ranks: Ranks, keep: int, keep_every: int) -> None:
        self.folder, self.step, self.ranks, self.keep, self.keep_every = folder, step, ranks, keep, keep_every
        self.final, self.partial = folder / _name(step), folder / f"partial-{_name(step)}"
        self.files: dict[str, Any] = {}

    @contextlib.contextmanager
    def removed_if_it_fails(self) -> Iterator[None]:
        """Inside, a CheckpointError leaves nothing."""
        try:
            yield
        except CheckpointError:
            if self.ranks.first:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def together(self, what: str, work: Callable[[], Any]) -> list[Any]:
        """Every rank's result of `work`. Raises: CheckpointError on all ranks when it failed on one."""
        try:
            outcome: tuple[Any, str | None] = work(), None
        except Exception as error:  # whatever it is, the other ranks wait for this one's vote
            outcome = None, f"{type(error).__name__}: {error}"
        outcomes = self.ranks.gather(outcome)
        if failed := [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]:
            raise CheckpointError(
                f"checkpoint: {what} of step {self.step} failed, the one before is untouched; {'; '.join(failed)}"
            )
        return [result for result, _ in outcomes]

    def take(self, what: str, work: Callable[[], dict[str, Any]]) -> None:
        """Note the files that `work` wrote on every rank."""
        for written in self.together(what, work):
            self.files |= written

    def begin(self) -> None:
        """Make it, and drop what earlier saves left half done."""

        def make() -> None:
            if self.ranks.first:
                for left in self.folder.glob("partial-step-*"):
                    shutil.rmtree(left)
                self.partial.mkdir(parents=True)

        self.together("making the folder", make)

    def hashed(self, name: str) -> dict[str, Any]:
        """A written file's facts, once it is on the disk."""
        file = self.partial / name
        sync(file)
        return {name: {"bytes": file.stat().st_size, "sha256": sha256(file)}}

    def write(self, kind: str, part: int, share: dict[str, Tensor]) -> dict[str, Any]:
        """One of this rank's files."""
        if not share:
            return {}
        name = f"{kind}-{part:03d}-{self.ranks.rank:05d}-of-{self.ranks.world:05d}.safetensors"
        save_file(share, self.partial / name)
        (self.partial / name).chmod(self.partial.stat().st_mode & 0o666)  # safetensors lets its owner alone read it
        return self.hashed(name)

    def write_facts(self, facts: str) -> dict[str, Any]:
        """The first rank's STATE."""
        if not self.ranks.first:
            return {}
        replace_text(self.partial / STATE, facts)
        return self.hashed(STATE)

    def finish(self) -> Path:
        """Give it its name, point LATEST at it, drop the old ones."""

        def rename() -> None:
            if not self.ranks.first:
                return
            manifest = {"step": self.step, "files": self.files}
            replace_text(self.partial / MANIFEST, json.dumps(manifest, indent=1))
            sync(self.partial)
            shutil.rmtree(self.final, ignore_errors=True)  # a broken one that was passed over
            self.partial.rename(self.final)
            sync(self.folder)
            replace_text(self.folder / LATEST, self.final.name + "\n")
            steps = _steps(self.folder)
            for old in [step for step in steps if step <= self.step][: -self.keep]:
                if not self.keep_every or old % self.keep_every:
                    try:
                        shutil.rmtree(steps[old])
                    except OSError as error:  # a reader on a network disk holds it open: the new one is whole
                        print(f"checkpoint {_name(old)} cannot be deleted: {error}", file=sys.stderr, flush=True)

        self.together("finishing", rename)
        return self.final


def save(
    folder: Path,
    step: int,
    engine: deepspeed.DeepSpeedEngine,
    ema: Ema,
    ranks: Ranks,
    extra: dict[str, Any],
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Write the checkpoint of `step` on all ranks and drop the old ones. A collective call.

    extra: small values needed to continue (loader place, counters), the same on every rank; JSON can hold them.
    keep: how many of the newest stay. keep_every: checkpoints at multiples of it stay too; 0 for none.

    Raises: CheckpointError on all ranks when one could not write; no other checkpoint has changed then.
    """
    to = _Folder(folder, step, ranks, keep, keep_every)
    with to.removed_if_it_fails(), contextlib.closing(_shares(engine, ema, ranks)) as shares:
        to.begin()
        for kind, part, share in shares:
            to.take("writing", bound(to.write, kind, part, share))
            del share
        to.take("writing", bound(to.write_facts, _facts(step, engine, ema, ranks, extra)))
        return to.finish()


class BackgroundSave:
    """`save`, whose files a thread writes from a copy in memory while training goes on.

    The checkpoint is there once `finish` returns; until then the one before it is the newest. Collective calls, both.

    Raises: CheckpointError on all ranks when one cannot make the folder.
    """

    def __init__(
        self, folder: Path, step: int, engine: deepspeed.DeepSpeedEngine, ema: Ema, ranks: Ranks, extra: dict[str, Any],
        keep: int, keep_every: int = 0,
    ) -> None:  # fmt: skip
        self.step = step
        self._to = _Folder(folder, step, ranks, keep, keep_every)
        with self._to.removed_if_it_fails():
            self._to.begin()
        shares, facts = list(_shares(engine, ema, ranks)), _facts(step, engine, ema, ranks, extra)
        self._written: dict[str, Any] = {}
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._write, args=(shares, facts), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, shares: list[tuple[str, int, dict[str, Tensor]]], facts: str) -> None:
        try:
            while shares:
                self._written |= self._to.write(*shares.pop(0))
            self._written |= self._to.write_facts(facts)
        except Exception as error:
            self._failed = error

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._thread.is_alive()

    def _result(self) -> dict[str, Any]:
        self._thread.join()
        if self._failed is not None:
            raise self._failed
        return self._written

    def finish(self) -> Path:
        """Wait for the files and make the checkpoint whole. A collective call.

        Raises: CheckpointError on all ranks when one could not write; no other checkpoint has changed then.
        """
        with self._to.removed_if_it_fails():
            self._to.take("writing", self._result)
            return self._to.finish()


def fault(path: Path, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with a checkpoint, naming the file; None for a whole one. Hashes are shared out over the ranks."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        step, files = manifest["step"], manifest["files"]
        expected = [(name, int(facts["bytes"]), str(facts["sha256"])) for name, facts in sorted(files.items())]
    except FileNotFoundError:
        return f"{path / MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path / MANIFEST} cannot be read: {error}"
    for i, (name, size, digest) in enumerate(expected):
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes, wanted {size}"
        if i % world == rank and sha256(file) != digest:
            return f"{file} is not what was written (SHA-256 differs)"
    try:
        written = json.loads((path / STATE).read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path / STATE} cannot be read: {error}"
    return None if step == written else f"{path / MANIFEST} is of step {step}, {STATE} of step {written}"


def candidates(folder: Path) -> list[Path]:
    """Checkpoints to try: the one `latest` names, then the others, newest first."""
    found = list(_steps(folder).values())[::-1]
    pointer = folder / LATEST
    named = folder / pointer.read_text(errors="replace").strip() if pointer.is_file() else None
    return [*(p for p in found if p == named), *(p for p in found if p != named)]


def find(folder: Path, ranks: Ranks) -> Path | None:
    """The checkpoint to continue from, verified by all ranks together; None where none was ever written.

    Broken ones are named on stderr and passed over.

    Raises: ConfigError when there are checkpoints and none is whole: never step 0 in silence.
    """
    tried = ranks.gather([str(p) for p in candidates(folder)])[0]
    for path in map(Path, tried):
        faults = [f for f in ranks.gather(fault(path, ranks.rank, ranks.world)) if f]
        if not faults:
            return path
        if ranks.first:
            print(f"checkpoint {path.name} is passed over: {faults[0]}", file=sys.stderr, flush=True)
    if tried or (folder / LATEST).is_file():
        raise ConfigError(
            f"resume: none of the {len(tried)} checkpoints in {folder} is whole; delete the folder to start anew"
        )
    return None


@contextlib.contextmanager
def opened(path: Path, kind: str) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """One of KINDS by parameter name; each entry reads its tensor, whole, to the CPU when it is called."""
    names = json.loads((path / MANIFEST).read_text())["files"]
    with contextlib.ExitStack() as stack:
        readers: dict[str, Callable[[], Tensor]] = {}
        for name in sorted(n for n in names if n.startswith(f"{kind}-")):
            file = stack.enter_context(safe_open(path / name, "pt"))
            readers |= {key: bound(file.get_tensor, key) for key in list(file.keys())}
        yield readers


def read_tensors(path: Path, kind: str) -> dict[str, Tensor]:
    """One of KINDS by parameter name, whole, on the CPU."""
    with opened(path, kind) as readers:
        return {name: read() for name, read in readers.items()}


def load(path: Path, engine: deepspeed.DeepSpeedEngine, ema: Ema) -> dict[str, Any]:
    """Restore weights, optimiser, schedule and average, whatever ranks and ZeRO stage saved them; what `save` was told
    comes back, with its "step".

    Raises: ConfigError when the parameters are not this model's.
    """
    facts, state = json.loads((path / STATE).read_text()), FullState(engine)
    for kind in ("ema", "exp_avg", "exp_avg_sq", "master"):  # the average goes by way of the masters
        with opened(path, kind) as readers:
            if set(readers) != set(state.names):
                odd = min(set(readers) ^ set(state.names))
                raise ConfigError(f"resume: {path} is of another model: {odd} is not in both")
            for name in state.names:
                value = readers[name]()
                if value.numel() != state.numel(name):
                    raise ConfigError(f"resume: {path} is of another model: {name} has another size")
                state.put(name, "master" if kind == "ema" else kind, value)
        if kind == "ema":
            ema.take_masters(facts["ema_steps"])
    state.adam_step = facts["adam_step"]
    state.refresh()
    schedule = engine.lr_scheduler
    schedule.last_epoch = facts["schedule_step"]
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
    return facts
