"""The model as one would write it first: padded prompts under a mask; every block fuses, embeds and projects in turn,
anew at every sampling step. What the packed, fused, folded and cached path is compared with; same weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sr_model import DiT, SemanticRoutingPipeline
from sr_model.flow import sigma_of
from sr_model.fusion import layers_read
from sr_model.layers import Block, image_rope, qk_norm_rope, text_rope


def encode(
    llm: Any, tokenizer: PreTrainedTokenizerBase, strategy: str, prompts: list[str], length: int
) -> tuple[Tensor, Tensor]:
    """transformers' own padded run: hidden states the strategy reads [L, B, length, C], mask [B, length]."""
    batch = tokenizer(
        [prompt or tokenizer.pad_token for prompt in prompts],
        return_tensors="pt", padding="max_length", max_length=length, padding_side="right",
    ).to(llm.device)  # fmt: skip
    before = llm.config._attn_implementation
    llm.set_attn_implementation("sdpa")
    try:
        out = llm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    finally:
        llm.set_attn_implementation(before)
    wanted = layers_read(strategy, len(out.hidden_states) - 1)
    return torch.stack([out.hidden_states[i] for i in wanted]), batch["attention_mask"].bool()


def cross_attention(block: Block, x: Tensor, k: Tensor, v: Tensor, mask: Tensor, eps: float) -> Tensor:
    """x [B, N, H] on padded keys and values [B, length, Hkv, hd] under mask [B, length] -> [B, N, H]."""
    cross = block.cross_attn
    q = qk_norm_rope(cross.q_proj(x).unflatten(-1, (cross.heads, cross.head_dim)), cross.q_norm, None, eps)
    out = F.scaled_dot_product_attention(
        *(y.transpose(1, 2) for y in (q, k, v)), attn_mask=mask[:, None, None], enable_gqa=True
    )
    return cross.o_proj(out.transpose(1, 2).flatten(2))


def velocity(dit: DiT, x: Tensor, t: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    """DiT.forward on padded text: x [B, channels, H, W], t [1|B], hidden [L, B, length, C], mask [B, length]."""
    config, conditioner = dit.config, dit.conditioner
    alpha = dit.fusion_weights(t, config.text_layers)  # [1|B, 1|D, L]
    read = layers_read(config.strategy, config.text_layers)
    alpha = alpha[..., read[0] - 1 : read[-1]]
    normed = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-5)

    def embed(d: int) -> Tensor:
        weights = alpha[:, d].to(normed.dtype).expand(hidden.shape[1], -1)  # [B, L]
        return conditioner.embed(conditioner.norm(torch.einsum("bl,lbnc->bnc", weights, normed)))

    embedded = embed(0) if alpha.shape[1] == 1 else None
    rope = None
    if conditioner.rope_base is not None:
        rope = text_rope(torch.arange(mask.shape[1], device=x.device), config.head_dim, conditioner.rope_base)
    p, h = config.patch_size, dit.patch_embed(x).flatten(2).transpose(1, 2)
    image = image_rope(x.shape[2] // p, x.shape[3] // p, config.head_dim, config.rope_base, x.device)
    for d, block in enumerate(dit.blocks):
        text = embed(d) if embedded is None else embedded
        kv = F.linear(text, conditioner.kv_weight[d]).unflatten(-1, (2, config.num_kv_heads, config.head_dim))
        k, v = kv.unbind(2)
        k = qk_norm_rope(k, conditioner.k_norm[d], rope, config.norm_eps)
        h = h + block.self_attn(block.norm1(h), image)
        h = h + cross_attention(block, h, k, v, mask, config.norm_eps)
        h = h + block.mlp(block.norm2(h))
    out = dit.proj_out(dit.norm_out(h)).unflatten(1, (x.shape[2] // p, x.shape[3] // p)).unflatten(-1, (p, p, -1))
    return out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


@torch.no_grad()
def sample(
    pipe: SemanticRoutingPipeline, prompts: list[str], latents: Tensor, steps: int, guidance: float, length: int
) -> Tensor:
    """What `pipe(prompts, latents=..., output_type="latent")` computes, from prompts padded to `length` tokens."""
    dit, scheduler = pipe.transformer, pipe.scheduler
    asked = [pipe.config.prompt_template + prompt for prompt in [""] * len(prompts) + prompts]
    hidden, mask = encode(pipe.text_encoder, pipe.tokenizer, dit.config.strategy, asked, length)
    x = latents.to(dit.device, torch.float32)
    scheduler.set_timesteps(steps, device=dit.device)
    for timestep in scheduler.timesteps:
        t = sigma_of(timestep.float() / scheduler.config.num_train_timesteps).view(1)
        both = velocity(dit, torch.cat([x, x]).to(dit.dtype), t, hidden, mask).float()
        v_negative, v_text = both.chunk(2)
        x = scheduler.step(-(v_negative + guidance * (v_text - v_negative)), timestep, x, return_dict=False)[0]
    return x
