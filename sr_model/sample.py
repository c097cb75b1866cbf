"""Draw pictures with a saved pipeline: `python -m sr_model.sample PIPELINE "a red circle" "a blue square"`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from sr_model.pipeline import SemanticRoutingPipeline

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    """Command line; writes one PNG a picture and prints its path."""
    parser = argparse.ArgumentParser(prog="python -m sr_model.sample", description=__doc__)
    parser.add_argument("pipeline", type=Path, help="folder that training exported, or SemanticRoutingPipeline saved")
    parser.add_argument("prompt", nargs="+", help="what to draw; several prompts give several pictures")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder for the PNGs (default: pictures)")
    parser.add_argument("--images", type=int, default=1, help="pictures of every prompt (default: 1)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (default: 50)")
    parser.add_argument("--guidance", type=float, default=6.0, help="guidance scale (default: 6.0)")
    parser.add_argument("--negative", default=None, help="negative prompt")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture; the next ones count up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="of weights; default: bf16 on a GPU, else fp32")
    args = parser.parse_args(argv)
    if not (args.pipeline / "model_index.json").is_file():
        parser.error(f"pipeline: wanted a folder with a model_index.json, found none in {args.pipeline}")
    dtype = DTYPES[args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")]
    pipe = SemanticRoutingPipeline.from_pretrained(args.pipeline, torch_dtype=dtype).to(args.device)
    count = len(args.prompt) * args.images
    try:
        images = pipe(
            args.prompt,
            negative_prompt=args.negative,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            num_images_per_prompt=args.images,
            generator=[torch.Generator().manual_seed(args.seed + i) for i in range(count)],
        ).images
    except ValueError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        path = args.out / f"{i:04d}.png"
        image.save(path)
        print(f"{path}  {args.prompt[i // args.images]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
