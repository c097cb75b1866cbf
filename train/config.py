"""The run's configuration: a tree of frozen dataclasses, whose defaults are the paper's (Section 4.1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

Strategy = Literal["b1", "b2", "b3", "s1", "s2", "s3", "fusedit"]
SECTIONS = ("model", "text", "data", "optim", "flow", "eval", "guard")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it and what is wanted, in one line."""


@dataclass(frozen=True)
class ModelConfig:
    """The DiT's size.

    Args:
        size: a model preset of sr_model: paper or demo.
        depth: number of blocks; None keeps the preset's, here and below.
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        mlp_size: inner width of the SwiGLU.
        patch_size: side of a patch, in latent pixels.
        rope_base: base of the rotary embeddings; fusedit takes the LLM's own unless it is given.
        text_layers: layers the LLM must have; None takes any LLM, whose layers and width the model then has.
    """

    size: str = "paper"
    depth: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_size: int | None = None
    patch_size: int | None = None
    rope_base: float | None = None
    text_layers: int | None = None


@dataclass(frozen=True)
class TextConfig:
    """The frozen LLM.

    Args:
        llm: a Hugging Face name or folder, or "smollm2" for the one that comes as a Python package.
        template: text before every caption; a dropped prompt is the template alone.
        max_tokens: captions are cut at this many tokens, and counted.
        cache_mb: memory for features of captions already seen, in MiB; 0 turns it off.
    """

    llm: str = "Qwen/Qwen3-VL-4B-Instruct"
    template: str = "Describe this image."
    max_tokens: int = 512
    cache_mb: int = 0


@dataclass(frozen=True)
class DataConfig:
    """Images and captions, as MDS shards.

    Args:
        path: folder with the splits train/ and val/, as `python -m train.prepare` writes them, or s3://BUCKET/PREFIX.
        cache: folder of this node that keeps what was fetched from `path`; default for a store: in ~/.cache. With a
            `path` that is a folder too (a network disk), its shards are copied there.
        cache_gb: most that the cache holds of training shards, in GiB; what was used longest ago is dropped. 0: all.
        image_size: side in pixels; the shards' images must have it.
        workers: loader processes of each rank; 0 reads in the training process.
        vae: a Hugging Face name or folder of a diffusers AutoencoderKL, or "pixels" for none.
        shapes_samples: build the shapes corpus of this many pictures at `path` if nothing is there; 0 never does.
        shapes_captions: how many different captions that corpus has.
        captions: caption columns and their weights, COLUMN=WEIGHT,...; each sample's caption is drawn from them anew
            whenever it is trained on.
        mix: corpora to train on in place of `path` alone and their weights, PATH=WEIGHT,...; an epoch has as many
            samples as all of them hold, shared out by weight. `path` still gives the validation split and the prompts.
    """

    path: str = "data/train"
    cache: str | None = None
    cache_gb: float = 0.0
    image_size: int = 256
    workers: int = 4
    vae: str = "stabilityai/stable-diffusion-3-medium-diffusers"
    shapes_samples: int = 0
    shapes_captions: int = 600
    captions: dict[str, float] = field(default_factory=lambda: {"caption": 1.0})
    mix: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW.

    Args:
        lr: peak learning rate.
        betas: AdamW's betas.
        weight_decay: decoupled weight decay.
        warmup_steps: linear warm-up from 0.
        schedule: constant, or cosine down to a twentieth of lr at the last step.
        clip: gradient norm to clip at.
        ema: decay of the weights' moving average, a step.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float = 1.0
    ema: float = 0.9999


@dataclass(frozen=True)
class FlowConfig:
    """Flow matching and prompt drop.

    Args:
        shift: SD3's shift of noise levels, on training draws and on the sampling schedule alike.
        logit_mean: mean of the logit-normal noise level, before the shift.
        logit_std: its standard deviation.
        prompt_drop: share of samples trained without their caption.
    """

    shift: float = 3.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    prompt_drop: float = 0.1


@dataclass(frozen=True)
class EvalConfig:
    """What is measured and drawn on the way and at the end, with the averaged weights.

    Args:
        every: steps between validations; 0 only at the first and last step.
        val_samples: validation samples, each at t = 0.1, 0.2 ... 0.9 with fixed noise.
        prompts: a .txt (one prompt a line) or .jsonl file (key "caption"); default: the corpus's prompts.jsonl.
        grid: pictures in the sample grid.
        score: prompts that are drawn and scored at the end, where the prompts file tells what they assert; 0 for none.
        steps: sampling steps.
        guidance: classifier-free guidance scale.
        batch_size: pictures drawn at a time.
    """

    every: int = 5000
    val_samples: int = 512
    prompts: str | None = None
    grid: int = 36
    score: int = 0
    steps: int = 50
    guidance: float = 6.0
    batch_size: int = 32


@dataclass(frozen=True)
class GuardConfig:
    """What is done when a step goes wrong.

    Args:
        max_skipped: give up after so many steps in a row whose loss or gradient was not finite; each changes nothing.
        spike: say so when a loss is this many deviations above the median of the last 100; 0 never.
        stall_seconds: end a rank that stays in one part of a step for longer, with its stacks; 0 never.
    """

    max_skipped: int = 10
    spike: float = 10.0
    stall_seconds: float = 1800.0


@dataclass(frozen=True)
class Config:
    """Train a diffusion transformer conditioned on every layer of a frozen LLM.

    Args:
        strategy: how the LLM's layers are fused (see the README's table).
        out: folder of the run; default runs/PRESET-STRATEGY.
        preset: the preset this configuration started from.
        resume: continue from the newest checkpoint in `out` if there is one; false refuses a folder that holds a run.
        seed: of everything drawn: weights, order, noise, times, dropped prompts.
        steps: optimiser steps.
        stop_at: end (with a checkpoint) after this step, as if interrupted; the schedule still spans `steps`.
        batch_size: samples in an optimiser step, over all ranks.
        micro_batch_size: samples in one forward pass of one rank; default: its share of the batch, or what of it fits.
        zero: DeepSpeed ZeRO stage.
        dtype: of the DiT; fp32 masters are kept under bf16. auto: bf16 where the device is fast at it.
        gradient_checkpointing: what of a block the backward pass recomputes: none; selective, all but matrix products
            and attention (half the memory, little time); full, all of it (least memory, a third more time).
        compile: torch.compile the blocks; auto: on a GPU.
        log_every: steps between progress lines.
        checkpoint_every: steps between checkpoints; there is always one at the end.
        async_save: checkpoints are written by a thread, from a copy in the CPU's memory (16 bytes a parameter, shared
            out over the ranks), while training goes on; until one is whole the one before it is the newest. The last
            one, and the one on a signal, are waited for.
        keep_checkpoints: how many of the newest are kept.
        keep_every: checkpoints at multiples of this many steps are kept for good; 0 for none.
        export: write a diffusers pipeline folder at the end.
        model: the DiT's size.
        text: the frozen LLM.
        data: images and captions.
        optim: the optimiser.
        flow: flow matching.
        eval: validation and pictures.
        guard: what is done when a step goes wrong.
    """

    strategy: Strategy = "s2"
    out: str | None = None
    preset: str = "paper-256"
    resume: bool = True
    seed: int = 0
    steps: int = 500_000
    stop_at: int | None = None
    batch_size: int = 512
    micro_batch_size: int | None = None
    zero: Literal[0, 1, 2, 3] = 2
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: Literal["auto", "true", "false"] = "auto"
    log_every: int = 50
    checkpoint_every: int = 5000
    async_save: bool = False
    keep_checkpoints: int = 3
    keep_every: int = 0
    export: bool = True
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.out or f"runs/{self.preset}-{self.strategy}")

    def to_yaml(self) -> str:
        """The resolved configuration; `--config FILE` reads it back."""
        plain = asdict(self)
        plain["optim"]["betas"] = list(plain["optim"]["betas"])
        return yaml.safe_dump(plain, sort_keys=False)


def build_section(name: str, value: Any) -> Any:
    """A section's dataclass from a plain dict (jsonargparse gives either)."""
    section = {f.name: f.default_factory for f in fields(Config) if f.name in SECTIONS}.get(name)
    if section is None or is_dataclass(value):
        return value
    return section(**value)  # type: ignore[misc]


def from_plain(plain: dict[str, Any]) -> Config:
    """The configuration whose `dataclasses.asdict` went through JSON. Not validated: its data may be elsewhere.

    Raises: ConfigError for keys of another version.
    """
    try:
        sections = {name: build_section(name, value) for name, value in plain.items()}
        optim = replace(sections["optim"], betas=tuple(sections["optim"].betas))
        return Config(**{**sections, "optim": optim})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"config: the checkpoint has one of another version of this program: {error}") from None
