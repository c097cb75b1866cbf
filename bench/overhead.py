"""The paper's Table 4, measured: `python -m bench.overhead`, then `python -m bench.report`.

Per strategy: parameters; latency and peak memory of a guided picture, LLM included, VAE not, over b1's in the same
round; and the way from the plain path (padded, one block at a time, unfolded, uncached) to ours, factor by factor. Full
size on a GPU; on a CPU a model of a quarter of every size, with the paper's proportion of image to text tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import plain, provenance
from bench.setting import PAPER, SETTINGS, Setting, dit, language_model, pipeline, prompt, tokenizer
from sr_kernels.routing import op as routing
from sr_model import STRATEGIES, DiT, SemanticRoutingPipeline, flops
from sr_model.build import parameter_count

GUIDANCE = 6.0
# Table 4: parameters in millions, TFLOP and milliseconds of a 512x512 picture
PAPER_TABLE = {
    "b1": (2247, 454, 2339),
    "b2": (2247, 454, 2370),
    "b3": (2247, 454, 2373),
    "s1": (2247, 454, 2391),
    "s2": (2247, 470, 2515),
    "s3": (2249, 470, 2523),
    "fusedit": (1712, 357, 2575),
}
FACTORS = ("plain", "unpad", "fuse", "fold", "cache", "compile", "graph")  # each adds one to those before it


@contextmanager
def routing_backend(name: str | None) -> Iterator[None]:
    """The routing kernel that runs inside; None leaves it to the device."""
    before = os.environ.pop(routing.VARIABLE, None)
    if name is not None:
        os.environ[routing.VARIABLE] = name
    routing._CHOSEN.clear()
    try:
        yield
    finally:
        os.environ.pop(routing.VARIABLE, None)
        if before is not None:
            os.environ[routing.VARIABLE] = before
        routing._CHOSEN.clear()


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def draw(pipe: SemanticRoutingPipeline, tokens: int, start: Tensor, steps: int) -> Tensor:
    """One guided picture's latents; the prompt goes through the LLM, whatever was encoded before."""
    pipe._encoder = None
    return pipe(
        prompt(tokens), latents=start, num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="latent",
        height=start.shape[2] * pipe.codec.factor, width=start.shape[3] * pipe.codec.factor,
    ).images  # fmt: skip


@contextmanager
def plain_blocks(pipe: SemanticRoutingPipeline) -> Iterator[None]:
    """Inside, blocks that were compiled run as they were written."""
    kept = [block.__dict__.pop("forward", None) for block in pipe.transformer.blocks]
    try:
        yield
    finally:
        for block, forward in zip(pipe.transformer.blocks, kept, strict=True):
            if forward is not None:
                block.forward = forward


def factor(pipe: SemanticRoutingPipeline, name: str, tokens: int, start: Tensor, setting: Setting) -> Tensor:
    """The same picture with the factors up to `name`."""
    if name == "plain":
        return plain.sample(pipe, [prompt(tokens)], start, setting.steps, GUIDANCE, max(setting.tokens))
    at = FACTORS.index(name)
    conditioner = pipe.transformer.conditioner
    pipe.cuda_graphs = at >= FACTORS.index("graph")
    pipe.cache_text_kv = at >= FACTORS.index("cache")
    conditioner.fold = None if at >= FACTORS.index("fold") else False
    compiled = nullcontext() if at >= FACTORS.index("compile") else plain_blocks(pipe)
    try:
        with routing_backend(None if at >= FACTORS.index("fuse") else "reference"), compiled:
            return draw(pipe, tokens, start, setting.steps)
    finally:
        pipe.cuda_graphs, pipe.cache_text_kv, conditioner.fold = True, True, None


def predicted(model: DiT, llm_config: Any, name: str, tokens: int, setting: Setting) -> int:
    """FLOPs of the picture that `factor` draws. The kernel moves fewer bytes, not fewer FLOPs."""
    padded, once = (
        max(setting.tokens),
        flops.sampling(model, llm_config, setting.image_tokens, tokens, 1, setting.steps),
    )
    if name == "plain":
        products = flops.attention_products(model, setting.image_tokens, padded) * 2 * setting.steps
        products += flops.llm_products(llm_config, model.config.text_layers, [padded] * 2)
        products -= 2 * padded * model.config.text_layers * flops.llm_layer_products(llm_config)  # counted below
        return 2 * products + flops.paper_sampling(model, llm_config, setting.image_tokens, padded, setting.steps).total
    if name in ("cache", "compile", "graph"):
        return once.total
    model.conditioner.fold = None if name == "fold" else False
    try:
        times = setting.steps if name == "fold" else 1
        text = flops.text_products(model, tokens + 1, times) * (setting.steps // times)
    finally:
        model.conditioner.fold = None
    return once.total - once.text + 2 * text


def interleaved(runs: dict[Any, Callable[[], Any]], rounds: int, device: torch.device, label: str) -> dict[Any, list]:
    """Seconds of every run in every round, in turns, each round starting with another; one warm-up each."""
    names, taken = list(runs), {name: [] for name in runs}
    with tqdm(total=len(names) * (rounds + 1), desc=label, unit="picture", file=sys.stderr) as bar:
        for i in range(-1, rounds):
            for j in range(len(names)):
                name = names[(i + j) % len(names)]
                spent = seconds(runs[name], device)
                if i >= 0:
                    taken[name].append(spent)
                bar.update()
    return taken


def summary(taken: list[float], base: list[float]) -> dict[str, Any]:
    """Median, quartiles and the ratio to `base` round by round."""
    ratios = [a / b for a, b in zip(taken, base, strict=True)]
    return {
        "seconds": statistics.median(taken),
        "quartiles": statistics.quantiles(taken, n=4)[::2] if len(taken) > 1 else [taken[0]] * 2,
        "over_base": statistics.median(ratios),
        "over_base_quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else [ratios[0]] * 2,
    }


def peak(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes allocated on a GPU at the peak of one call, over what was there before; None on a CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def measure(
    setting: Setting, strategies: list[str], rounds: int, factors: bool, compiled: bool, device: torch.device
) -> dict[str, Any]:
    """Latencies of the strategies, and of the factors; `compiled`: the blocks of ours by torch.compile."""
    dtype, words = torch.bfloat16, tokenizer()
    llm = language_model(setting, device, dtype)
    pipes = {s: pipeline(dit(s, setting, device, dtype), llm, words) for s in strategies}
    for pipe in pipes.values() if compiled else ():
        pipe.transformer.compile_blocks()
    left_out = (() if compiled else ("compile",)) + (() if device.type == "cuda" else ("graph",))
    names = [name for name in FACTORS if name not in left_out]
    channels = pipes[strategies[0]].transformer.config.in_channels
    start = torch.randn(1, channels, setting.side, setting.side, generator=torch.Generator().manual_seed(0))
    rows, ladder = [], []
    for tokens in setting.tokens:
        runs = {s: (lambda p=pipe, n=tokens: draw(p, n, start, setting.steps)) for s, pipe in pipes.items()}
        taken = interleaved(runs, rounds, device, f"{tokens}-token prompts")
        for s, run in runs.items():
            base = taken["b1"] if "b1" in taken else taken[s]
            cost = flops.sampling(pipes[s].transformer, llm.config, setting.image_tokens, tokens, 1, setting.steps)
            rows.append({"strategy": s, "tokens": tokens, "flops": cost.total, **summary(taken[s], base),
                         "peak_bytes": peak(run, device)})  # fmt: skip
    tokens = min(setting.tokens)
    for s, pipe in pipes.items() if factors else ():
        if s == "fusedit":
            continue  # it has no fusion, embedder or projection
        want = plain.sample(pipe, [prompt(tokens)], start, 1, GUIDANCE, max(setting.tokens)).float()
        got = draw(pipe, tokens, start, 1).float()
        error = ((got - want).norm() / want.norm()).item()
        if error > 0.02:  # no time without the right picture
            raise RuntimeError(f"{s}: the plain path and ours differ by {error:.3g}")
        counted = {name: predicted(pipe.transformer, llm.config, name, tokens, setting) for name in names}
        runs = {name: (lambda p=pipe, f=name: factor(p, f, tokens, start, setting)) for name in names}
        taken = interleaved(runs, max(1, rounds // 2), device, f"{s}, factors")
        for name in names:
            ladder.append({"strategy": s, "factor": name, "tokens": tokens, "padded_to": max(setting.tokens),
                           "flops": counted[name], **summary(taken[name], taken["plain"])})  # fmt: skip
    return {"rows": rows, "factors": ladder}


def main(argv: list[str] | None = None) -> int:
    """Command line; writes bench/results/overhead-DEVICE.json."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=SETTINGS, help="sizes; default: paper on a GPU, reduced on a CPU")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--rounds", type=int, default=9, help="pictures of each strategy and length (default 9)")
    parser.add_argument(
        "--compile", choices=("auto", "true", "false"), default="auto", help="our blocks; auto: on a GPU"
    )
    parser.add_argument("--no-factors", action="store_true", help="leave out the way from the plain path to ours")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds: wanted at least 1, got {arguments.rounds}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = SETTINGS[arguments.setting or ("paper" if device.type == "cuda" else "reduced")]
    full = {s: dit(s, PAPER, "meta", torch.bfloat16) for s in STRATEGIES}
    llm_config = language_model(PAPER, torch.device("meta"), torch.bfloat16).config
    counted = {
        s: {
            "parameters": parameter_count(model),
            "paper_flops": flops.paper_sampling(model, llm_config).total,
            "flops": {n: flops.sampling(model, llm_config, PAPER.image_tokens, n).parts for n in PAPER.tokens},
        }
        for s, model in full.items()
    }
    compiled = arguments.compile == "true" or (arguments.compile == "auto" and device.type == "cuda")
    measured = measure(setting, arguments.strategies, arguments.rounds, not arguments.no_factors, compiled, device)
    result = {
        **provenance.header(),
        "setting": setting.name,
        "steps": setting.steps,
        "image_tokens": setting.image_tokens,
        "compiled": compiled,
        "full_size": counted,
        "paper": PAPER_TABLE,
        **measured,
    }
    path = provenance.result_path("overhead")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}; `python -m bench.report` puts it into the README")
    return 0


if __name__ == "__main__":
    sys.exit(main())
