"""What one H200 should need, by arithmetic alone: `python -m bench.projection`, then `python -m bench.report`.

Not a measurement. Time = FLOPs / (share x dense bf16 peak) + bytes routing must move / (share x copy bandwidth): the
FLOPs of `sr_model.flops`, the bytes of `bench.model`, products at one share of the peak, everything else hidden.
Ratios between strategies depend little on the two shares, since they stand in both terms.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from bench import provenance
from bench.model import Routing
from bench.overhead import predicted
from bench.setting import PAPER, dit, language_model
from sr_model import STRATEGIES, DiT, FuseDiT, flops
from sr_model.fusion import STATIC_IN_TIME, fused_states, layers_read
from train.distributed import PEAKS

DEVICE, COPY = "H200", 4.3e12  # bytes a second that a copy reaches there
TRAINING = {"image_tokens": 256, "micro_batch": 32, "caption": 128, "padded": 512}  # paper-256


def routing_bytes(model: DiT | FuseDiT, tokens: int) -> int:
    """What one forward pass of the fusion must move; the backward pass moves as much."""
    c: Any = model.config
    if c.strategy == "fusedit":
        return 0
    layers = len(layers_read(c.strategy, c.text_layers))
    return Routing(layers, fused_states(c.strategy, c.depth), tokens, c.text_dim, 2).forward_bytes


def project(products: float, moved: float, shares: tuple[float, float]) -> float:
    """Seconds for so many FLOPs and bytes. shares: of the peak, and of the copy bandwidth."""
    return products / (shares[0] * PEAKS[DEVICE]) + moved / (shares[1] * COPY)


def picture(model: DiT | FuseDiT, llm: Any, tokens: int, shares: tuple[float, float]) -> float:
    """Seconds of a guided picture of Table 4's setting."""
    once = model.config.strategy in STATIC_IN_TIME or model.config.strategy == "fusedit"
    moved = routing_bytes(model, tokens + 1) * (1 if once else PAPER.steps)
    return project(flops.sampling(model, llm, PAPER.image_tokens, tokens, 1, PAPER.steps).total, moved, shares)


def step(model: DiT | FuseDiT, llm: Any, padded: bool, shares: tuple[float, float]) -> float:
    """Seconds of one micro-step of training with the LLM; padded: by the plain path, unfolded."""
    images, tokens = TRAINING["micro_batch"], TRAINING["padded" if padded else "caption"]
    lengths = [tokens] * images
    if padded:
        assert isinstance(model, DiT)
        model.conditioner.fold = False
    products = 3 * flops.forward(model, TRAINING["image_tokens"], lengths).total
    if padded:
        model.conditioner.fold = None
    layers = model.config.text_layers if padded else flops.layers_run(model)
    products += 2 * flops.llm_products(llm, layers, lengths)
    return project(products, 2 * routing_bytes(model, sum(lengths)), shares)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; writes bench/results/projection.json."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.projection", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--products", type=float, default=0.6, help="share of the peak (default %(default)s)")
    parser.add_argument("--copy", type=float, default=0.85, help="share of the copy bandwidth (default %(default)s)")
    arguments = parser.parse_args(argv)
    shares = arguments.products, arguments.copy
    if not all(0 < share <= 1 for share in shares):
        parser.error(f"--products, --copy: wanted shares above 0 and at most 1, got {shares[0]} and {shares[1]}")
    llm = language_model(PAPER, torch.device("meta"), torch.bfloat16).config
    rows = []
    for strategy in STRATEGIES:
        model = dit(strategy, PAPER, "meta", torch.bfloat16)
        joint = strategy == "fusedit"  # the plain path is the DiT's
        plain = None if joint else project(predicted(model, llm, "plain", max(PAPER.tokens), PAPER), 0, shares)
        rows.append(
            {
                "strategy": strategy,
                "picture": {tokens: picture(model, llm, tokens, shares) for tokens in PAPER.tokens},
                "picture_plain": plain,
                "step": step(model, llm, False, shares),
                "step_plain": None if joint else step(model, llm, True, shares),
            }
        )
    facts = {"of": DEVICE, "peak": PEAKS[DEVICE], "copy": COPY, "shares": shares, "training": TRAINING, "rows": rows}
    path = provenance.RESULTS / "projection.json"
    path.write_text(json.dumps({**provenance.header(), **facts}, indent=1) + "\n")
    print(f"wrote {path}; `python -m bench.report` puts it into the README")
    return 0


if __name__ == "__main__":
    sys.exit(main())
