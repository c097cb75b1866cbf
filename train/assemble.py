"""What a run is made of: codec, text encoder, model, engine, loader; checked cheapest first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sr_model import DiT, FuseDiT, TextEncoder, build
from sr_model.codec import PixelCodec, VaeCodec, latent_factor, vae_settings
from sr_model.fusedit import rope_theta
from sr_model.presets import PRESETS
from train import embedded_llm, preflight
from train.config import Config, ConfigError
from train.data import Part, TrainLoader, open_data
from train.distributed import Ranks, fast_bf16
from train.engine import Ema, build_engine
from train.evaluate import Evaluator
from train.latents import moments_shape
from train.prepare import prepare_shapes


@dataclass
class Parts:
    """What a run is made of."""

    config: Config
    ranks: Ranks
    dtype: torch.dtype
    encoder: TextEncoder
    codec: PixelCodec | VaeCodec
    engine: Any
    ema: Ema
    loader: TrainLoader


def model_sizes(config: Config) -> dict[str, Any]:
    """Arguments that replace the model preset's. Raises: ConfigError for an unknown preset."""
    if config.model.size not in PRESETS:
        raise ConfigError(f"model.size: wanted one of {', '.join(PRESETS)}, got {config.model.size!r}")
    return {k: v for k, v in asdict(config.model).items() if k != "size" and v is not None}


def check_image_size(config: Config, factor: int, data: dict[str, list[Part]] | None = None) -> None:
    """Raises: ConfigError when a side of the images is not a multiple of the VAE's factor times the patch."""
    unit = factor * (config.model.patch_size or PRESETS[config.model.size]["patch_size"])
    wanted = f"wanted a multiple of {unit} (patch {unit // factor} x latent factor {factor})"
    if config.data.image_size % unit:
        raise ConfigError(f"data.image_size: {wanted}, got {config.data.image_size}")
    for part in (part for parts in (data or {}).values() for part in parts):
        if part.size[0] % unit or part.size[1] % unit:
            raise ConfigError(f"data.path: {wanted} for both sides of the images in {part.source}")


def load_codec(config: Config, ranks: Ranks, dtype: torch.dtype) -> PixelCodec | VaeCodec:
    """Pixels, or the VAE (from its own folder or a pipeline's `vae` subfolder), checked before its weights are read.

    Raises: ConfigError.
    """
    if config.data.vae == "pixels":
        check_image_size(config, PixelCodec.factor)
        return PixelCodec()
    try:
        check_image_size(config, latent_factor(vae_settings(config.data.vae)[0]))
        return VaeCodec.from_pretrained(config.data.vae, ranks.device, dtype)
    except OSError as error:
        raise ConfigError(f"data.vae: wanted a diffusers AutoencoderKL or 'pixels': {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """An exception's message without its paragraphs."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def load_encoder(config: Config, ranks: Ranks, dtype: torch.dtype) -> TextEncoder:
    """The frozen LLM on the device, set to the layers the strategy reads. Raises: ConfigError."""
    path: str | Path = config.text.llm
    try:
        if config.text.llm == embedded_llm.NAME:
            path = embedded_llm.converted()
        encoder = TextEncoder.from_pretrained(
            path,
            device=ranks.device,
            dtype=dtype,
            template=config.text.template,
            max_tokens=config.text.max_tokens,
            cache_bytes=config.text.cache_mb << 20,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"text.llm: {first_line(error).removeprefix('text.llm: ')}") from None
    if config.model.text_layers not in (None, encoder.num_layers):
        raise ConfigError(
            f"text.llm: wanted {config.model.text_layers} layers (model.text_layers), {config.text.llm!r} has "
            f"{encoder.num_layers}"
        )
    return encoder


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def llm_sizes(config: Config, encoder: TextEncoder) -> dict[str, Any]:
    """What the LLM decides of the model's sizes; FuseDiT also takes its heads and RoPE base.

    Raises: ConfigError when joint attention is asked for and the heads differ.
    """
    sizes: dict[str, Any] = {"text_dim": encoder.text_dim, "text_layers": encoder.num_layers}
    if config.strategy != "fusedit":
        return sizes
    llm, preset = encoder.llm.config, PRESETS[config.model.size]
    head_dim = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    for name, wanted in (("num_kv_heads", llm.num_key_value_heads), ("head_dim", head_dim)):
        got = getattr(config.model, name) or preset[name]
        if got != wanted:
            raise ConfigError(f"model.{name}: wanted the LLM's {wanted} for strategy fusedit, got {got}")
    return sizes | {"rope_base": config.model.rope_base or rope_theta(llm), "norm_eps": llm.rms_norm_eps}


def assemble(config: Config, ranks: Ranks) -> tuple[Parts, Evaluator]:
    """Everything a run needs, checked cheapest first. Raises: ConfigError."""
    sizes = model_sizes(config)
    check_image_size(config, 1)  # again with the VAE's factor, once that is known
    if config.data.shapes_samples and ranks.first:
        try:
            prepare_shapes(
                config.data.path,
                samples=config.data.shapes_samples,
                captions=config.data.shapes_captions,
                size=config.data.image_size,
            )
        except ValueError as error:
            raise ConfigError(f"data.path: {error}") from None
    ranks.barrier()
    data = open_data(config.data, ranks)
    check_image_size(config, 1, data)
    dtype = torch.float32
    if config.dtype == "bf16" or (config.dtype == "auto" and all(ranks.gather(fast_bf16(ranks.device)))):
        dtype = torch.bfloat16
    codec = ranks.together(lambda: load_codec(config, ranks, dtype))
    check_image_size(config, codec.factor, data)
    moments = moments_shape([*data["train"], *data["val"]], codec)
    encoder = ranks.together(lambda: load_encoder(config, ranks, dtype))
    sizes |= {"in_channels": codec.channels, **llm_sizes(config, encoder)}

    def new_model(device: str) -> DiT | FuseDiT:
        return build(config.strategy, config.model.size, device, **sizes)

    try:
        shape = new_model("meta")
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None
    encoder.read(**shape.reads(encoder.num_layers))
    micro, lines = preflight.check(
        config, ranks, shape, codec.factor, dtype,
        f"{config.text.llm} with {encoder.num_layers} layers, {len(encoder.kv_layers or encoder.layer_ids)} read",
        weight_bytes(encoder.llm) + (weight_bytes(codec.vae) if isinstance(codec, VaeCodec) else 0),
        data["train"], moments is not None,
    )  # fmt: skip
    for line in lines:
        ranks.say(line)
    config = replace(config, micro_batch_size=micro)

    torch.manual_seed(config.seed)
    model = new_model("cpu").to(ranks.device)
    model.enable_gradient_checkpointing(config.gradient_checkpointing)
    engine = build_engine(model, config, ranks.world, dtype == torch.bfloat16)
    ema = Ema(engine, config.optim.ema)
    loader = TrainLoader(
        data["train"], list(config.data.captions), moments, micro, config.batch_size, config.data.workers, config.seed
    )
    evaluator = Evaluator(config, ranks, new_model, dtype, encoder, codec, data["val"], moments)
    return Parts(config, ranks, dtype, encoder, codec, engine, ema, loader), evaluator
