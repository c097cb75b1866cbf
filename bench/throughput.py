"""A training step, measured part by part: `python -m bench.throughput`, then `python -m bench.report`.

The training program's own step (DeepSpeed, text encoder, codec, EMA) on random pictures and captions of a fixed length,
with random weights: nothing is downloaded. Full size at 256x256 pixels on a GPU, a reduced model on a CPU. On several
ranks: `deepspeed --num_gpus 8 --module bench.throughput`. `plain` is the same step on padded prompts, block by block,
unfolded.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from bench import plain, provenance
from bench.setting import PAPER, REDUCED, Setting, dit, language_model, prompt, tokenizer
from sr_model import STRATEGIES, TextEncoder
from sr_model.codec import PixelCodec, VaeCodec
from train.assemble import Parts, weight_bytes
from train.config import Config, DataConfig
from train.distributed import Ranks, peak_flops, start
from train.engine import Ema, build_engine
from train.guards import Guard
from train.loop import training_step
from train.preflight import memory
from train.runlog import PARTS, Clock

SD3_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}


@dataclass(frozen=True)
class PaddedText:
    """What `plain.velocity` reads, with the lengths that the training step counts."""

    hidden: Tensor
    mask: Tensor
    lengths: list[int]

    @property
    def cu_seqlens_host(self) -> tuple[int, ...]:
        """Only the number of tokens is read of these."""
        return 0, sum(self.lengths)


class PaddedEncoder:
    """transformers' own padded run of the LLM in place of the packed one."""

    def __init__(self, encoder: TextEncoder, strategy: str, padded: int) -> None:
        self.encoder, self.strategy, self.padded, self.flops = encoder, strategy, padded, 0

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> PaddedText:
        """Hidden states padded to a fixed length."""
        hidden, mask = plain.encode(self.encoder.llm, self.encoder.tokenizer, self.strategy, prompts, self.padded)
        return PaddedText(hidden, mask, mask.sum(1).tolist())


def batches(micro: int, size: int, tokens: int) -> Iterator[tuple[Tensor, list[tuple[str, ...]]]]:
    """Random pictures, and captions that are no two alike to the encoder's eye: it keeps none."""
    g = torch.Generator().manual_seed(0)
    while True:
        images = torch.randint(0, 256, (micro, 3, size, size), generator=g, dtype=torch.uint8)
        yield images, [(prompt(tokens),) for _ in range(micro)]


def make_parts(arguments: argparse.Namespace, setting: Setting, strategy: str, ranks: Ranks, llm: Any) -> Parts:
    """What `train.loop.training_step` needs, on random weights."""
    dtype, full = torch.bfloat16, setting is PAPER
    config = Config(
        strategy=strategy,
        batch_size=arguments.micro_batch * ranks.world * arguments.accumulate,
        micro_batch_size=arguments.micro_batch,
        zero=arguments.zero,
        gradient_checkpointing=arguments.gradient_checkpointing,
        compile=arguments.compile,
        data=DataConfig(image_size=256 if full else setting.side),
    )
    codec: PixelCodec | VaeCodec = PixelCodec()
    if full:
        with ranks.device:
            codec = VaeCodec(AutoencoderKL(**SD3_VAE).to(dtype))
    model = dit(strategy, setting, ranks.device, torch.float32, in_channels=codec.channels).train()
    model.requires_grad_(True).enable_gradient_checkpointing(config.gradient_checkpointing)
    encoder = TextEncoder(llm, tokenizer(), cache_bytes=0, **model.reads(len(llm.layers)))
    engine = build_engine(model, config, ranks.world, bf16=True)
    ema = Ema(engine, config.optim.ema)
    return Parts(config, ranks, dtype, encoder, codec, engine, ema, loader=None)  # type: ignore[arg-type]


@contextlib.contextmanager
def conditioner_clock(parts: Parts, clock: Clock) -> Iterator[list[float]]:
    """Seconds of the conditioner's forward passes; on a GPU it waits for them, so the other parts are timed apart."""
    spent: list[float] = []
    module = getattr(parts.engine.module, "conditioner", None)
    if module is None:
        yield spent
        return
    began = [0.0]

    def now() -> float:
        if clock.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def before(*_: Any) -> None:
        began[0] = now()

    def after(*_: Any) -> None:
        spent.append(now() - began[0])

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def measure(parts: Parts, path: str, arguments: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Median step of one strategy by one path."""
    ranks, device, strategy = parts.ranks, parts.ranks.device, parts.config.strategy
    cuda = device.type == "cuda"
    if path == "plain":
        parts.encoder = PaddedEncoder(parts.encoder, strategy, max(setting.tokens))  # type: ignore[assignment]
        model = parts.engine.module
        model.forward = lambda x, t, text: plain.velocity(model, x, t, text.hidden, text.mask)
    source = batches(arguments.micro_batch, parts.config.data.image_size, arguments.tokens)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    clock, steps, number = Clock(device), [], 0
    guard = Guard(parts.config.guard, parts.engine, ranks)
    label = f"{strategy}, {path}"
    for i in tqdm(range(arguments.warmup + arguments.steps), desc=label, unit="step", disable=not ranks.first):
        began = time.perf_counter()
        taken = training_step(parts, number, source, clock, guard)
        number += 1
        split = clock.read()  # waits for the GPU
        if i >= arguments.warmup:
            steps.append((time.perf_counter() - began, taken, split))
    with conditioner_clock(parts, clock) as conditioner:
        training_step(parts, number, source, clock, guard)
    clock.read()
    if arguments.trace and path == "ours":
        with torch.profiler.profile() as profiler:
            training_step(parts, number + 1, source, clock, guard)
        if ranks.first:
            profiler.export_chrome_trace(str(arguments.trace.with_suffix(f".{strategy}.json")))
    seconds = statistics.median(s for s, _, _ in steps)
    flops, peak = statistics.median(taken.flops for _, taken, _ in steps), peak_flops(device)
    tokens = statistics.median(taken.tokens for _, taken, _ in steps) * ranks.world
    split = {part: statistics.median(split[part] for _, _, split in steps) for part in PARTS}
    own = split["forward"] + split["backward"]
    return {
        "strategy": strategy,
        "path": path,
        "seconds": seconds,
        "quartiles": statistics.quantiles([s for s, _, _ in steps], n=4)[::2] if len(steps) > 1 else [seconds] * 2,
        "images_per_s": parts.config.batch_size / seconds,
        "text_tokens_per_s": tokens / seconds,
        "tflop_per_s": flops / seconds / 1e12,
        "mfu": None if peak is None else flops / seconds / peak,
        "mfu_dit": None if peak is None else flops / own / peak,
        "seconds_by_part": {**split, "conditioner, within forward": sum(conditioner)},
        "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
    }


def fitting(arguments: argparse.Namespace, ranks: Ranks, llm: Any) -> int:
    """The largest micro-batch up to 32 that fits at full size; the plain path, not compiled, keeps twice as much."""
    config = Config(zero=arguments.zero, gradient_checkpointing=arguments.gradient_checkpointing)
    model = dit("s3", PAPER, "meta", torch.bfloat16)
    need = memory(config, ranks, model, 8, torch.bfloat16, weight_bytes(llm), [(256, 256)])
    return next((n for n in (32, 16, 8, 4, 2) if need.fits(n * (2 if arguments.plain else 1))), 1)


def main(argv: list[str] | None = None) -> int:
    """Command line; rank 0 writes bench/results/throughput-DEVICE.json."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    full = torch.cuda.is_available()
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=["b1", "s2", "s3"])
    parser.add_argument("--plain", nargs="*", choices=STRATEGIES[:-1], default=["s2"], help="also by the plain path")
    parser.add_argument("--tokens", **number, default=128 if full else 32, help="a caption (default %(default)s)")
    parser.add_argument("--micro-batch", **number, help="default: 4 on a CPU; on a GPU 32, or what of it fits")
    parser.add_argument("--accumulate", **number, default=1, help="micro-steps of a step (default %(default)s)")
    parser.add_argument("--steps", **number, default=10, help="timed steps (default %(default)s)")
    parser.add_argument("--warmup", **number, default=3, help="steps before (default %(default)s)")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=2 if full else 1)
    parser.add_argument("--gradient-checkpointing", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--compile", choices=("auto", "true", "false"), default="auto")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="also write profiler traces: FILE.STRATEGY.json")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    arguments = parser.parse_args(argv)
    for name in ("tokens", "micro_batch", "accumulate", "steps"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: wanted at least 1, got {getattr(arguments, name)}")
    if arguments.zero == 3 and arguments.plain:
        parser.error("--zero: wanted 0 to 2 with --plain, which calls parts of a block, got 3; give --plain nothing")
    ranks, setting, rows = start(), PAPER if full else REDUCED, []
    llm = language_model(setting, ranks.device, torch.bfloat16)
    if arguments.micro_batch is None:
        arguments.micro_batch = fitting(arguments, ranks, llm) if full else 4
    about = {
        **provenance.header(),
        "setting": setting.name,
        "world": ranks.world,
        "micro_batch": arguments.micro_batch,
        "zero": arguments.zero,
        "tokens": arguments.tokens,
        "padded_to": max(setting.tokens),
    }
    path = provenance.result_path("throughput" if ranks.world == 1 else f"throughput {ranks.world} ranks")
    for way, strategies in (("ours", arguments.strategies), ("plain", arguments.plain)):
        for strategy in strategies:
            parts = make_parts(arguments, setting, strategy, ranks, llm)
            rows.append(measure(parts, way, arguments, setting))
            if ranks.first:  # after every one: the next may not fit
                path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
            parts.engine.destroy()
            del parts
            gc.collect()
            if full:
                torch.cuda.empty_cache()
    if ranks.first:
        print(f"wrote {path}; `python -m bench.report` puts it into the README")
    return 0


if __name__ == "__main__":
    code = main()
    torch.distributed.destroy_process_group()
    sys.exit(code)
