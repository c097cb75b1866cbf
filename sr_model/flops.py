"""Floating-point operations of the model in closed form, two a multiply-add, from its sizes alone.

Two accountings of a guided picture. `sampling` is what this code computes: real tokens, each different prompt through
the LLM once, keys and values once where the strategy does not depend on time, the context embedder folded where that
is cheaper, attention products counted. `paper_sampling` is Table 4's: prompts padded, everything anew at each step, the
context embedder once for every fused state, attention products left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sr_model.dit import DiT
from sr_model.fusedit import FuseDiT
from sr_model.fusion import STATIC_IN_TIME, fused_states, layers_read

Transformer: TypeAlias = "DiT | FuseDiT"


@dataclass(frozen=True)
class Flops:
    """By part.

    image: products on image tokens. attention: queries by keys, and by values. text: fusion, context embedder and K/V
    projections. llm: the language model.
    """

    image: int = 0
    attention: int = 0
    text: int = 0
    llm: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def __mul__(self, times: int) -> Flops:
        return Flops(*(times * part for part in self.parts))

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """(image, attention, text, llm)."""
        return self.image, self.attention, self.text, self.llm

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts)

    @property
    def model(self) -> int:
        """DiT and conditioner, without the LLM."""
        return self.image + self.attention + self.text


def image_products(dit: Transformer) -> int:
    """Multiply-adds of one image token through the whole transformer, attention products apart."""
    c: Any = dit.config
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    block = c.hidden_size * (2 * heads + 2 * kv + 3 * c.mlp_size)
    if c.strategy != "fusedit":
        block += c.hidden_size * 2 * heads  # cross-attention's queries and output
    return c.depth * block + 2 * c.patch_size**2 * c.in_channels * c.hidden_size


def attention_products(dit: Transformer, image_tokens: int, text_tokens: int) -> int:
    """Multiply-adds of one sample's attention, all blocks: every query by its keys, and by their values."""
    c: Any = dit.config
    return c.depth * 2 * c.num_heads * c.head_dim * image_tokens * (image_tokens + text_tokens)


def text_products(dit: Transformer, tokens: int, times: int = 1) -> int:
    """Multiply-adds of keys and values for `tokens` real tokens, made `times` times from the same weights."""
    c: Any = dit.config
    if c.strategy == "fusedit":
        return 0  # they are the LLM's own
    rows, kv = fused_states(c.strategy, c.depth), 2 * c.num_kv_heads * c.head_dim
    layers = len(layers_read(c.strategy, c.text_layers))
    a_token = c.text_dim * (rows * layers + c.depth * kv)
    assert isinstance(dit, DiT)
    if dit.conditioner.folds(tokens, rows, times):
        return times * tokens * a_token + c.depth * kv * c.text_dim**2
    return times * tokens * (a_token + rows * c.text_dim**2)


def llm_layer_products(llm_config: Any) -> int:
    """Multiply-adds of one token through one decoder layer of a Hugging Face LLM with a gated MLP, attention apart."""
    c = llm_config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    heads, kv = c.num_attention_heads * head_dim, c.num_key_value_heads * head_dim
    return c.hidden_size * (2 * heads + 2 * kv + 3 * c.intermediate_size)


def llm_products(llm_config: Any, layers: int, lengths: Sequence[int]) -> int:
    """Multiply-adds of packed prompts through the first `layers` layers, causal attention included."""
    c = llm_config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    return layers * (sum(lengths) * llm_layer_products(c) + 2 * c.num_attention_heads * head_dim * pairs)


def layers_run(dit: Transformer) -> int:
    """How many of the LLM's layers have to run."""
    c: Any = dit.config
    return c.first_layer + c.depth if c.strategy == "fusedit" else max(layers_read(c.strategy, c.text_layers))


def forward(dit: Transformer, image_tokens: int, lengths: Sequence[int]) -> Flops:
    """One forward pass of len(lengths) samples of `image_tokens` each, their prompts `lengths` real tokens; no LLM.

    Training takes three times as much: the backward pass has two products for each one here.
    """
    return Flops(
        image=2 * len(lengths) * image_tokens * image_products(dit),
        attention=2 * sum(attention_products(dit, image_tokens, n) for n in lengths),
        text=2 * text_products(dit, sum(lengths)),
    )


def sampling(
    dit: Transformer, llm_config: Any, image_tokens: int, prompt: int, negative: int = 1, steps: int = 50
) -> Flops:
    """A guided picture as this code computes it: `prompt` and `negative` are real tokens."""
    c: Any = dit.config
    lengths, once = (prompt, negative), c.strategy in STATIC_IN_TIME
    step = Flops(
        image=2 * 2 * image_tokens * image_products(dit),
        attention=2 * sum(attention_products(dit, image_tokens, n) for n in lengths),
    )
    return step * steps + Flops(
        text=2 * text_products(dit, sum(lengths), 1 if once else steps),
        llm=2 * llm_products(llm_config, layers_run(dit), lengths),
    )


def paper_sampling(
    dit: Transformer, llm_config: Any, image_tokens: int = 1024, padded: int = 512, steps: int = 50
) -> Flops:
    """A guided picture by the accounting of Table 4: 2 x `padded` text tokens at every step, no attention products."""
    c: Any = dit.config
    kv, tokens = 2 * c.num_kv_heads * c.head_dim, 2 * padded
    layers, a_token = layers_run(dit), 0
    if c.strategy != "fusedit":
        layers = c.text_layers  # all of them run, the last one's output is only not read by b1
        rows = fused_states(c.strategy, c.depth)
        a_token = c.depth * kv * c.text_dim + rows * (c.text_dim**2 + c.text_layers * c.text_dim)
    return Flops(
        image=2 * 2 * steps * image_tokens * image_products(dit),
        text=2 * steps * tokens * a_token,
        llm=2 * layers * tokens * llm_layer_products(llm_config),
    )
