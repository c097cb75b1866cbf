"""What keeps a run from harm: steps that are not finite, losses that jump, signals, steps that never end.

`Guard.verdict` is the one collective of a step: it tells all ranks alike whether some rank's loss or gradient is not
finite (DeepSpeed itself looks at few combinations of type and ZeRO stage), whether some rank was told to stop, and
whether some rank is still writing a checkpoint.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from torch import Tensor

from train.config import GuardConfig
from train.distributed import Alarm, Ranks

PREEMPTED, STALLED = 75, 70  # exit codes: a checkpoint was written on a signal; a step did not end (sysexits.h)
BEAT = 1.0  # seconds between a watchdog's looks
GRACE = 2.0  # seconds for ranks to hear of one that failed or ended, more than between two looks
SILENT = 120.0  # seconds after which a rank that tells nothing has gone, with its machine perhaps
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class NonFiniteSteps(RuntimeError):
    """Loss or gradient was not finite too many steps in a row; the weights are those of the last good step."""


class Guard:
    """Watches loss and gradients of one engine, and the signals of this process. Make one a run.

    skipped: steps that changed nothing, so far. stopping: a rank was told to stop. saving: set before a step to
    whether this rank still writes a checkpoint, after it whether any rank does.
    """

    def __init__(self, config: GuardConfig, engine: deepspeed.DeepSpeedEngine, ranks: Ranks) -> None:
        self.config, self.ranks, self.engine = config, ranks, engine
        self.skipped, self.in_a_row, self.stopping, self.saving = 0, 0, False, False
        self._odd = torch.zeros((), device=ranks.device)  # 0 as long as all is finite, then NaN
        self._losses: deque[float] = deque(maxlen=100)
        self._asked = False
        self._before: dict[int, Any] = {}
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self.look_at)

    def look_at(self, value: Tensor) -> None:
        """Note a loss or a gradient; nothing waits for the device."""
        self._odd += value.detach().sum(dtype=torch.float32) * 0  # infinite or NaN times 0 is NaN

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR1 as the wish to stop after this step with a checkpoint. Main thread only."""
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def verdict(self, step: int) -> bool:
        """Whether the step may change the weights: the same answer on all ranks. A collective call.

        Raises: NonFiniteSteps after guard.max_skipped steps in a row.
        """
        said = torch.tensor([self._asked, self.saving], dtype=torch.float32, device=self._odd.device)
        votes = torch.cat([(~torch.isfinite(self._odd)).float()[None], said])
        self._odd.zero_()
        if self.ranks.world > 1:
            torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        odd, asked, saving = votes.tolist()
        self.stopping = self.stopping or bool(asked)
        self.saving = bool(saving)
        if not odd:
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.config.max_skipped:
            raise NonFiniteSteps(
                f"loss or gradient: not finite in {self.in_a_row} steps in a row (guard.max_skipped), the last is step "
                f"{step}; the weights of step {step - self.in_a_row} are untouched"
            )
        return False

    def spike(self, loss: float) -> float | None:
        """How many deviations a loss lies above the median of the last 100, where that is more than guard.spike.

        The deviation is 1.4826 times the median absolute one, so that earlier spikes do not hide the next.
        """
        before = list(self._losses)
        self._losses.append(loss)
        if not self.config.spike or len(before) < 20:
            return None
        median = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(x - median) for x in before)
        height = (loss - median) / max(deviation, 1e-12)
        return height if height > self.config.spike else None


def skip_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """`engine.step()` without a step: the gradients are dropped, weights, moments and schedule stay as they are."""
    optimizer = engine.optimizer
    own = optimizer.__dict__.get("step")  # the learning-rate schedule wraps it there

    def drop(*_: Any, **__: Any) -> None:
        if hasattr(optimizer, "_overflow_clean_up"):  # ZeRO-3
            optimizer.micro_step_id = 0
            optimizer._overflow_clean_up(None)
        elif hasattr(optimizer, "averaged_gradients"):  # ZeRO-1 and 2
            optimizer.micro_step_id = -1
            optimizer.zero_grad(set_to_none=True)
            optimizer._release_preflattened_grad_buffers()
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None
        else:
            optimizer.zero_grad()

    had = getattr(optimizer, "overflow", None)
    optimizer.step, optimizer.overflow = drop, True  # so the engine neither steps the schedule nor counts a step
    try:
        engine.step()
    finally:
        if own is None:
            del optimizer.step
        else:
            optimizer.step = own
        if had is None:
            del optimizer.overflow
        else:
            optimizer.overflow = had


class Places:
    """Where every rank is, told each second through the process group's store by a thread that training cannot hold up.

    With one rank there is nothing to tell.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.store = None
        self._heard: dict[int, tuple[bytes | None, float]] = {}  # what a rank told last, and when that was first seen
        if ranks.world > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            patience = timedelta(seconds=30)
            self.store = torch.distributed.TCPStore(address, port, wait_for_workers=False, timeout=patience)

    def tell(self, phase: str, step: int) -> None:
        """This rank lives and is there. What the store answers is not waited for, nor missed when it has gone."""
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"place/{self.ranks.rank}", json.dumps([phase, step, time.time()]))

    def others(self, phase: str, step: int) -> list[str]:
        """A line for each rank that is silent or elsewhere, or one that says that rank 0 does not answer."""
        if self.store is None:
            return []
        found: list[str] = []
        asking = threading.Thread(target=self._ask, args=(phase, step, found), daemon=True)
        asking.start()
        asking.join(5)
        return ["rank 0 was last heard of too long ago: it does not answer"] if asking.is_alive() else found

    def silent(self, now: float) -> int | None:
        """A rank that has told nothing new for SILENT seconds, by this process's own monotonic clock `now`.

        Waits where the store does not answer, for 30 seconds; then rank 0 has told nothing new.
        """
        if self.store is None:
            return None
        told: list[bytes | None] = [None] * self.ranks.world
        with contextlib.suppress(RuntimeError):
            keys = [f"place/{rank}" for rank in range(self.ranks.world)]
            if self.store.check(keys):
                told = list(self.store.multi_get(keys))
            else:  # some have not begun
                told = [self.store.get(key) if self.store.check([key]) else b"" for key in keys]
        for rank, place in enumerate(told):
            before, since = self._heard.setdefault(rank, (place, now))
            if place is not None and place != before:
                self._heard[rank] = place, now
            elif now - since > SILENT:
                return rank
        return None

    def _ask(self, phase: str, step: int, found: list[str]) -> None:
        assert self.store is not None
        with contextlib.suppress(RuntimeError):
            for rank in range(self.ranks.world):
                its_phase, its_step, when = json.loads(self.store.get(f"place/{rank}"))
                age = time.time() - when
                if age > 5 * BEAT:
                    found.append(f"rank {rank} was last heard of {age:.0f} s ago, in {its_phase!r} of step {its_step}")
                elif (its_phase, its_step) != (phase, step):
                    found.append(f"rank {rank} is in {its_phase!r} of step {its_step}")


class Watchdog:
    """Ends this process when a phase takes longer than `seconds`; says which rank hung, where, where the others are,
    and its stacks. 0 seconds: never.

    Also, in silence and soon, when another rank cannot go on: what this one waits for will not come.
    """

    def __init__(self, seconds: float, ranks: Ranks) -> None:
        self.seconds, self.ranks = seconds, ranks
        self._phase, self._since, self._step = "", None, 0  # type: str, float | None, int
        self._done = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, args=(Places(ranks),), name="watchdog", daemon=True).start()
        if ranks.world > 1:  # threads and connections of their own: a store that does not answer holds them up
            threading.Thread(target=self._listen, args=(Alarm(),), name="alarm", daemon=True).start()
            if seconds:
                threading.Thread(target=self._hear, args=(Places(ranks),), name="silence", daemon=True).start()

    def at(self, phase: str, step: int | None = None) -> None:
        """This phase begins now; "" for one that may take any time."""
        self._step = self._step if step is None else step
        self._phase, self._since = phase, time.monotonic() if phase else None

    def _listen(self, alarm: Alarm) -> None:
        while not self._done.wait(BEAT):
            if self._another_failed(alarm):
                os._exit(1)

    def _hear(self, places: Places) -> None:
        while not self._done.wait(SILENT / 12):
            if (rank := places.silent(time.monotonic())) is not None and not self._done.wait(GRACE):
                print(f"error: rank {rank} was not heard of for {SILENT:g} s", file=sys.stderr, flush=True)
                os._exit(STALLED)

    def _watch(self, places: Places) -> None:
        while not self._done.wait(min(BEAT, self.seconds / 4)):
            since, phase, step = self._since, self._phase, self._step
            places.tell(phase, step)
            if since is not None and time.monotonic() - since > self.seconds:
                others = places.others(phase, step)
                print(
                    f"error: rank {self.ranks.rank} has been in {phase!r} of step {step} for more than "
                    f"{self.seconds:g} s (guard.stall_seconds); {''.join(f'{line}; ' for line in others)}its stacks:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                os._exit(STALLED)

    def _another_failed(self, alarm: Alarm) -> bool:
        try:
            return alarm.sounds()
        except RuntimeError:
            return not self._done.wait(GRACE)  # the first rank is gone: unless all are at their end, it failed

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
