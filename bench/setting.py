"""The models that whole-model benchmarks run: random weights at the paper's sizes, or at sizes for a CPU.

Speed does not depend on the weights' values; nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from sr_model import DiT, FuseDiT, SemanticRoutingPipeline, build


@dataclass(frozen=True)
class Setting:
    """Sizes of one benchmark.

    sizes: what replaces the paper preset's. llm: sizes of the Qwen3 language model beside its width and layers.
    side: of the latents. tokens: prompt lengths; the longest is what the plain path pads to. steps: of sampling.
    """

    name: str
    sizes: dict[str, Any]
    llm: dict[str, int]
    side: int
    tokens: tuple[int, ...]
    steps: int

    @property
    def image_tokens(self) -> int:
        """Patches of one picture."""
        return (self.side // 2) ** 2


# 512x512 pixels; the language model of Qwen3-VL-4B
PAPER = Setting(
    "paper",
    {},
    {"intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    side=64,
    tokens=(128, 512),
    steps=50,
)
# A quarter of every width, of the depth and of both kinds of tokens, so that image to text stays 1024 to 128 or 512
REDUCED = Setting(
    "reduced",
    {"depth": 6, "hidden_size": 512, "num_heads": 16, "head_dim": 64, "num_kv_heads": 4, "mlp_size": 2048,
     "text_dim": 640},
    {"intermediate_size": 2432, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64},
    side=32,
    tokens=(32, 128),
    steps=20,
)  # fmt: skip
SETTINGS = {setting.name: setting for setting in (PAPER, REDUCED)}


def dit(strategy: str, setting: Setting, device: torch.device | str, dtype: torch.dtype, **sizes: int) -> DiT | FuseDiT:
    """A DiT of random weights, its zero-initialised output included (its logits stay uniform)."""
    torch.manual_seed(0)
    model = build(strategy, "paper", device, dtype, **{**setting.sizes, **sizes}).eval().requires_grad_(False)
    if model.proj_out.weight.device.type != "meta":
        torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    return model


def language_model(setting: Setting, device: torch.device, dtype: torch.dtype) -> Qwen3Model:
    """The frozen LLM's decoder stack with random weights."""
    model = build("b2", "paper", "meta", **setting.sizes)
    config = Qwen3Config(
        vocab_size=16, hidden_size=model.config.text_dim, num_hidden_layers=model.config.text_layers, **setting.llm
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Qwen3Model(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    raw = Tokenizer(models.WordLevel({"<pad>": 0, "w": 1}, unk_token="w"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="w")


def prompt(tokens: int) -> str:
    """A prompt of so many tokens."""
    return " ".join("w" for _ in range(tokens))


def pipeline(model: DiT | FuseDiT, llm: Qwen3Model, words: PreTrainedTokenizerFast) -> SemanticRoutingPipeline:
    """The sampling pipeline; its VAE only says what latents are like, and is not run."""
    blocks = 4
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(4,) * blocks,
        norm_num_groups=2,
        latent_channels=model.config.in_channels,
    )
    pipe = SemanticRoutingPipeline(model, FlowMatchEulerDiscreteScheduler(shift=3.0), llm, words, vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe
