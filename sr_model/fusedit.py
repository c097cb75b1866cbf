"""FuseDiT: the same transformer with joint attention, its text keys and values tapped from the LLM's own layers.

Block d attends from the image tokens to one sequence [text | image]: the keys (after the LLM's k-norm and RoPE) and
values of LLM layer first_layer + d, then the image's own. The text has no queries here; the LLM stays frozen.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from sr_kernels.attention import varlen_attention
from sr_model.dit import ImageTransformer, check_heads
from sr_model.layers import RecomputingBlock, SwiGLU, image_rope, qk_norm_rope
from sr_model.text_features import TextKV


class JointAttention(nn.Module):
    """Grouped-query attention of image queries on [text | image], with QK-norm and RoPE on the image's."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.eps = heads, kv_heads, head_dim, eps
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        self.q_norm = nn.Parameter(torch.ones(head_dim))
        self.k_norm = nn.Parameter(torch.ones(head_dim))

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, at: Tensor, rope: Tensor, cu_q: Tensor, cu_k: Tensor, max_k: int
    ) -> Tensor:
        """x [B, N, H] -> [B, N, H].

        keys, values: [T + B*N, Hkv, hd], each sample's text rows filled; its image rows, `at` [B*N], are written here,
        in place where there is no gradient.
        """
        batch, n, _ = x.shape
        rows = x.flatten(0, 1)  # [B*N, H]
        q = self.q_proj(rows).unflatten(-1, (self.heads, self.head_dim))
        k = self.k_proj(rows).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(rows).unflatten(-1, (self.kv_heads, self.head_dim))
        q = qk_norm_rope(q, self.q_norm, rope, self.eps)
        k = qk_norm_rope(k, self.k_norm, rope, self.eps)
        if torch.is_grad_enabled():
            keys, values = keys.index_copy(0, at, k), values.index_copy(0, at, v)
        else:
            keys.index_copy_(0, at, k)
            values.index_copy_(0, at, v)
        out = varlen_attention(q, keys, values, cu_q, cu_k, n, max_k)  # [B*N, Hq, hd]
        return self.o_proj(out.reshape(batch, n, -1))


class JointBlock(RecomputingBlock):
    """Joint attention and SwiGLU, each on a normed input and added to the residual stream."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, inner: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(hidden, eps=eps)
        self.self_attn = JointAttention(hidden, heads, kv_heads, head_dim, eps)
        self.norm2 = nn.RMSNorm(hidden, eps=eps)
        self.mlp = SwiGLU(hidden, inner)

    def run(self, x: Tensor, *joint: Any) -> Tensor:
        """x [B, N, H] and the arguments of `JointAttention` -> x."""
        x = x + self.self_attn(self.norm1(x), *joint)
        return x + self.mlp(self.norm2(x))


class FuseDiT(ImageTransformer, ModelMixin):  # a pipeline that is loaded looks for ModelMixin in this module
    """Velocity network v(x_t, text) with joint attention.

    Args:
        strategy: "fusedit".
        depth, hidden_size, num_heads, num_kv_heads, head_dim, mlp_size: the transformer's sizes; key and value heads
            and the head dim are the LLM's.
        in_channels, patch_size: latent channels and the side of a square patch.
        text_layers: the LLM's number of layers.
        first_layer: the LLM layer, from 0, that block 0 taps; default: as many layers stay unread below as above.
        rope_base: the LLM's RoPE base (rope_theta).
        norm_eps: eps of every RMSNorm.

    Raises: ValueError naming the argument.
    """

    zero3_leaves = (JointBlock,)  # compiled whole
    _no_split_modules = ("JointBlock",)

    @register_to_config
    def __init__(
        self,
        strategy: str,
        depth: int,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mlp_size: int,
        in_channels: int,
        patch_size: int,
        text_layers: int,
        first_layer: int | None = None,
        rope_base: float = 5e6,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if strategy != "fusedit":
            raise ValueError(f"strategy: wanted 'fusedit', got {strategy!r}")
        check_heads(num_heads, num_kv_heads, head_dim)
        if depth > text_layers:
            raise ValueError(f"depth: wanted at most the LLM's {text_layers} layers, one a block, got {depth}")
        first = (text_layers - depth) // 2 if first_layer is None else first_layer
        if not 0 <= first <= text_layers - depth:
            raise ValueError(f"first_layer: wanted 0 to {text_layers - depth}, got {first}")
        self.register_to_config(first_layer=first)
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(
            JointBlock(hidden_size, num_heads, num_kv_heads, head_dim, mlp_size, norm_eps) for _ in range(depth)
        )
        self.norm_out = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.proj_out = nn.Linear(hidden_size, patch_size * patch_size * in_channels)
        self.initialize()

    def reads(self, num_layers: int) -> dict[str, tuple[int, ...]]:
        """What to ask the text encoder for, as its own arguments."""
        first = self.config.first_layer
        return {"kv_layers": tuple(range(first, first + self.config.depth))}

    def forward(self, x: Tensor, t: Tensor, text: TextKV, gate_time: Tensor | None = None) -> Tensor:
        """Velocity data - noise.

        Args:
            x: [B, in_channels, H, W] noised latents, H and W multiples of the patch.
            t, gate_time: not used: neither the transformer nor its text sees time.
            text: the tapped keys and values of B prompts. Without gradient their joint buffers are kept with them, so
                that the steps of a sampling run write the text once.

        Raises: ValueError naming the argument.
        """
        h, rows, columns = self.patches(x, text.batch)
        n, lengths = rows * columns, text.cu_seqlens.diff()
        rope = image_rope(rows, columns, self.config.head_dim, self.config.rope_base, x.device, lengths.float())
        cu_q = torch.arange(0, (x.shape[0] + 1) * n, n, dtype=torch.int32, device=x.device)
        keys, values, at = joint_buffers(text, n, h.dtype)
        for block, k, v in zip(self.blocks, keys, values, strict=True):
            h = block(h, k, v, at, rope, cu_q, text.cu_seqlens + cu_q, text.max_len + n)
        return self.picture(h, rows, columns)


def rope_theta(llm_config: Any) -> float:
    """The RoPE base of a Hugging Face LLM's configuration."""
    config = getattr(llm_config, "text_config", llm_config)
    parameters = getattr(config, "rope_parameters", None) or {}  # transformers 5
    return float(parameters.get("rope_theta") or config.rope_theta)


def joint_buffers(text: TextKV, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [D, T + B*n, Hkv, hd] with the text rows written, and the image's rows [B*n].

    Without gradient they are made once and kept with `text`.
    """
    keep = not torch.is_grad_enabled()
    if keep and (kept := text.joint.get((n, dtype))) is not None:
        return kept
    spans = list(itertools.pairwise(text.cu_seqlens_host))
    text_rows = [row + b * n for b, (start, end) in enumerate(spans) for row in range(start, end)]
    image_rows = [row for b, (_, end) in enumerate(spans) for row in range(end + b * n, end + (b + 1) * n)]
    device = text.k.device
    where = torch.tensor(text_rows).to(device, non_blocking=True)
    shape = (text.k.shape[0], len(text_rows) + len(image_rows), *text.k.shape[2:])
    keys, values = (
        part.new_zeros(shape, dtype=dtype).index_copy_(1, where, part.to(dtype)) for part in (text.k, text.v)
    )
    made = keys, values, torch.tensor(image_rows).to(device, non_blocking=True)
    if keep:
        text.joint[n, dtype] = made
    return made
