"""What a run says while it works: progress lines, metrics.jsonl, TensorBoard, and where the time of a step goes."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from train.disk import replace_text

PARTS = ("data", "vae", "llm", "forward", "backward", "optimizer")


class Clock:
    """Seconds spent in each part of the steps since the last reading. On a GPU the device's time, by events."""

    def __init__(self, device: torch.device, on_part: Callable[[str], None] = lambda name: None) -> None:
        self.on_part = on_part  # told of every part that begins
        self.cuda = device.type == "cuda"
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge what happens inside to `name`, one of PARTS."""
        self.on_part(name)
        if self.cuda and name != "data":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        start_time = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start_time

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading; waits for the GPU once."""
        if self._events:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self.seconds[name] += start.elapsed_time(end) / 1000
            self._events.clear()
        seconds, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return seconds


class RunLog:
    """Rank 0's output of one run; silent on the others."""

    def __init__(self, folder: Path, first: bool, steps: int, start: int) -> None:
        self.first, self.path = first, folder / "metrics.jsonl"
        self.bar: tqdm | None = None
        self.board: Any = None
        if not first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():  # rows past the checkpoint that is resumed from would stand twice
            replace_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows() if row["step"] <= start))
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)
        except ImportError:
            self.say("TensorBoard is not installed: metrics go to metrics.jsonl alone")

    def say(self, line: str) -> None:
        """One line to the terminal, above the progress bar."""
        if self.first:
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def write(self, row: dict[str, Any]) -> None:
        """A row with its "step" into metrics.jsonl, and its numbers into TensorBoard."""
        if not self.first:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for key, value in row.items():
                if isinstance(value, int | float) and key != "step":
                    self.board.add_scalar(key, value, row["step"])

    def picture(self, path: Path, step: int) -> None:
        """A PNG into TensorBoard."""
        if self.board is not None:
            import numpy as np
            from PIL import Image

            self.board.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")

    def rows(self) -> list[dict[str, Any]]:
        """All rows written so far, earlier parts of a resumed run included; a line that a full disk cut is left out."""
        rows = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.is_file() else ():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict) and "step" in row]

    def close(self) -> None:
        """Finish the bar and TensorBoard's files."""
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()
