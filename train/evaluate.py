"""What a run is judged by: validation loss at fixed times, the sample grid, and the shapes score."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from sr_model import DiT, SemanticRoutingPipeline, TextEncoder
from sr_model.codec import PixelCodec, VaeCodec
from sr_model.flow import interpolate, velocity
from sr_model.fusion import centre_and_dispersion
from train.config import Config, ConfigError
from train.data import PROMPTS, Part, read_split, root
from train.distributed import Ranks
from train.draws import draw
from train.engine import Ema
from train.latents import to_latents
from train.shapes.scene import Scene
from train.shapes.scorer import score_batch

TIMES = tuple(k / 10 for k in range(1, 10))
VALIDATION_STEP = (1 << 31) - 1  # a step no training reaches: validation noise is never a training sample's


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt to draw; `scene` and `split` are known for the shapes corpus alone."""

    caption: str
    split: str = ""
    scene: Scene | None = None


def read_prompts(path: Path) -> list[EvalPrompt]:
    """Prompts of a .txt file (one a line) or a .jsonl file (keys caption, and split and scene where they are known).

    Raises: ConfigError naming the line that cannot be read.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return [EvalPrompt(line.strip()) for line in lines]
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            scene = Scene.from_json(row["scene"]) if "scene" in row else None
            prompts.append(EvalPrompt(row["caption"], row.get("split", ""), scene))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"eval.prompts: line {number} of {path} wants a JSON object with a caption: {error}"
            ) from None
    return prompts


def find_prompts(config: Config, captions: Sequence[str]) -> list[EvalPrompt]:
    """The prompts to draw: eval.prompts, else the corpus's prompts.jsonl, else validation captions."""
    path = Path(config.eval.prompts) if config.eval.prompts else root(config.data).folder / PROMPTS
    return read_prompts(path) if path.is_file() else [EvalPrompt(c) for c in dict.fromkeys(captions)]


def interleave(prompts: Sequence[EvalPrompt]) -> list[EvalPrompt]:
    """Prompts in turn from every split and skill, so that any first part shows them all."""
    groups: dict[tuple[str, str], list[EvalPrompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.split, prompt.scene.prompt.skill if prompt.scene else ""].append(prompt)
    deepest = max(map(len, groups.values()), default=0)
    return [group[i] for i in range(deepest) for group in groups.values() if i < len(group)]


def make_pipeline(
    config: Config, model: DiT, encoder: TextEncoder, codec: PixelCodec | VaeCodec
) -> SemanticRoutingPipeline:
    """The sampling pipeline of a run with this configuration."""
    return SemanticRoutingPipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.flow.shift),
        text_encoder=encoder.llm,
        tokenizer=encoder.tokenizer,
        vae=codec.vae if isinstance(codec, VaeCodec) else None,
        prompt_template=config.text.template,
        max_prompt_tokens=config.text.max_tokens,
        default_size=config.data.image_size,
    )


class Evaluator:
    """Validation and sampling with given weights, in a model of its own beside the one that trains."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        new_model: Callable[[str], DiT],
        dtype: torch.dtype,
        encoder: TextEncoder,
        codec: PixelCodec | VaeCodec,
        parts: Sequence[Part],
        moments: tuple[int, int] | None,
    ) -> None:
        self.config, self.ranks, self.new_model, self.dtype = config, ranks, new_model, dtype
        self.encoder, self.codec = encoder, codec
        weights = config.data.captions
        samples = read_split(parts, list(weights), moments, config.eval.val_samples)
        self.data = [data for data, _ in samples]  # images or moments
        chosen = draw(config.seed, VALIDATION_STEP, range(len(samples)), (1, 1, 1))
        self.captions = chosen.captions([captions for _, captions in samples], list(weights.values()))
        self.prompts = find_prompts(config, self.captions)

    def model(self, ema: Ema) -> DiT:
        """A model with the averaged weights on the device, in the run's dtype. A collective call."""
        model = self.new_model("meta")
        model.load_state_dict(ema.full_state(self.ranks.device, self.dtype), assign=True)
        return model.eval()

    @torch.no_grad()
    def validate(self, model: DiT) -> dict[str, float]:
        """Velocity MSE at t = 0.1 ... 0.9 with fixed noise, the samples shared out over the ranks; means over all."""
        config, device = self.config, self.ranks.device
        sums = torch.zeros(len(TIMES), dtype=torch.float64)
        mine = list(range(self.ranks.rank, len(self.captions), self.ranks.world))
        size = config.micro_batch_size or max(1, config.batch_size // self.ranks.world)
        groups = [list(group) for _, group in groupby(mine, lambda i: self.data[i].shape)]  # the sizes come in turn
        for at in (group[start : start + size] for group in groups for start in range(0, len(group), size)):
            x1 = to_latents(self.codec, torch.stack([self.data[i] for i in at]).to(device))
            noise = draw(config.seed, VALIDATION_STEP, at, tuple(x1.shape[1:])).noise.to(device)
            text = self.encoder.encode([self.captions[i] for i in at])
            for k, time in enumerate(TIMES):
                t = torch.full((len(at),), time, device=device)
                v = model(interpolate(x1, noise, t).to(self.dtype), t, text).float()
                sums[k] += (v - velocity(x1, noise)).square().flatten(1).mean(1).sum().double().cpu()
        total = torch.stack(self.ranks.gather(sums)).sum(0) / len(self.captions)
        return {"val_loss": total.mean().item()} | {
            f"val_loss_t{t}": loss for t, loss in zip(TIMES, total.tolist(), strict=True)
        }

    def pipeline(self, model: DiT) -> SemanticRoutingPipeline:
        """The sampling pipeline of this run around `model`."""
        return make_pipeline(self.config, model, self.encoder, self.codec)

    def sample(self, model: DiT, captions: Sequence[str], progress: str | None = None) -> list[Image.Image]:
        """One picture a caption; the i-th is drawn from seed and i alone, whatever the batch."""
        from tqdm import tqdm

        config, pipe = self.config, self.pipeline(model)
        pipe.set_progress_bar_config(disable=True)
        images: list[Image.Image] = []
        with tqdm(total=len(captions), desc=progress, unit="img", disable=None if progress else True) as bar:
            for start in range(0, len(captions), config.eval.batch_size):
                part = list(captions[start : start + config.eval.batch_size])
                images += pipe(
                    part,
                    num_inference_steps=config.eval.steps,
                    guidance_scale=config.eval.guidance,
                    generator=[
                        torch.Generator().manual_seed(config.seed * 1_000_003 + start + i) for i in range(len(part))
                    ],
                ).images
                bar.update(len(part))
        return images

    def score(self, model: DiT) -> dict[str, Any] | None:
        """Draw eval.score prompts and score them exactly; None where the prompts do not tell what they assert."""
        known = interleave([p for p in self.prompts if p.scene is not None])
        if not known or not self.config.eval.score:
            return None
        asked = [known[i % len(known)] for i in range(self.config.eval.score)]
        images = self.sample(model, [p.caption for p in asked], "scoring")
        pixels = np.stack([np.asarray(image) for image in images])
        result = {}
        for split in dict.fromkeys(p.split for p in asked):
            at = [i for i, p in enumerate(asked) if p.split == split]
            result[split] = score_batch([asked[i].scene for i in at], pixels[at])  # type: ignore[misc]
        return result


@torch.no_grad()
def fusion_row(model: DiT) -> dict[str, float]:
    """Centre and dispersion of learned fusion weights (eq. 14-17); the mean over TIMES where they have a time."""
    if model.config.strategy in ("b1", "b2", "fusedit"):
        return {}  # they have nothing to learn
    device = next(model.parameters()).device
    alpha = model.fusion_weights(torch.tensor(TIMES, device=device))  # [1|9, 1|D, L]
    centre, dispersion = (x.mean(0).tolist() for x in centre_and_dispersion(alpha))
    names = [f"_block{d}" for d in range(len(centre))] if len(centre) > 1 else [""]
    return {f"fusion_centre{n}": c for n, c in zip(names, centre, strict=True)} | {
        f"fusion_dispersion{n}": v for n, v in zip(names, dispersion, strict=True)
    }


def score_table(result: dict[str, Any]) -> list[str]:
    """The shapes score as lines of text: a row a skill, a column a split."""

    def percent(rate: float | None) -> str:
        return "-" if rate is None else f"{100 * rate:.0f}%"

    splits = list(result)
    lines = [f"{'shapes score':<24}" + "".join(f"{split.removeprefix('held-out-'):>20}" for split in splits)]
    for key, label in (("color", "single object: color"), ("shape", "single object: shape")):
        cells = [f"{percent(r['single'][key])} of {r['single']['count']}" for r in result.values()]
        lines.append(f"{label:<24}" + "".join(f"{cell:>20}" for cell in cells))
    for skill in dict.fromkeys(s for r in result.values() for s in r["skills"]):
        cells = []
        for r in result.values():
            rates = r["skills"].get(skill, {"count": 0, "passed": None})
            cells.append(f"{percent(rates['passed'])} of {rates['count']}" if rates["count"] else "-")
        lines.append(f"{skill:<24}" + "".join(f"{cell:>20}" for cell in cells))
    return lines
