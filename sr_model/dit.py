"""The diffusion transformer of the paper (Section 4.1): cross-attention blocks conditioned on all layers of an LLM.

- grouped-query attention with QK-norm, 2-D RoPE on image tokens, 1-D RoPE on text keys
- no timestep inside the DiT: only the gates of s1 and s3 see time
- text enters once, as keys and values for all blocks (`TextKV`); blocks never see features
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from sr_model.conditioner import Conditioner
from sr_model.flow import sigma_of
from sr_model.fusion import build_fusion, fused_states, layers_read
from sr_model.layers import CHECKPOINTING, Block, RecomputingBlock, image_rope
from sr_model.text_features import TextFeatures, TextKV


class ImageTransformer(ModelMixin, ConfigMixin):
    """What the two transformers share: patches in and out, initialisation, compilation, checkpointing of blocks."""

    _supports_gradient_checkpointing = True
    patch_embed: nn.Conv2d
    blocks: nn.ModuleList
    norm_out: nn.RMSNorm
    proj_out: nn.Linear

    def initialize(self) -> None:
        """Xavier for every Linear and for the patch convolution as one, zeros for biases and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.detach().flatten(1))
        assert self.patch_embed.bias is not None
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.zeros_(self.proj_out.weight)

    def enable_gradient_checkpointing(self, mode: str = "full") -> None:
        """Recompute blocks in the backward pass; mode: "full", "selective" or "none" (see `RecomputingBlock`).

        Raises: ValueError for another mode.
        """
        if mode not in CHECKPOINTING:
            raise ValueError(f"mode: wanted one of {', '.join(CHECKPOINTING)}, got {mode!r}")
        for block in self.blocks:
            assert isinstance(block, RecomputingBlock)
            block.checkpointing = mode

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations for the backward pass."""
        self.enable_gradient_checkpointing("none")

    def compile_blocks(self) -> None:
        """torch.compile every block, without graph breaks; hooks on the blocks (ZeRO-3's) stay outside."""
        for block in self.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True)

    def patches(self, x: Tensor, prompts: int) -> tuple[Tensor, int, int]:
        """x [B, in_channels, H, W] -> ([B, N, hidden], rows, columns), N = rows * columns tokens row by row.

        Raises: ValueError for another shape, or when there is not one prompt a sample.
        """
        p = self.config.patch_size
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(
                f"x: wanted [B, {self.config.in_channels}, H, W] with H and W multiples of {p}, got {list(x.shape)}"
            )
        if prompts != x.shape[0]:
            raise ValueError(f"text: wanted {x.shape[0]} prompts, one a sample of x, got {prompts}")
        return self.patch_embed(x).flatten(2).transpose(1, 2), x.shape[2] // p, x.shape[3] // p

    def picture(self, h: Tensor, rows: int, columns: int) -> Tensor:
        """[B, N, hidden] -> [B, in_channels, H, W]; a patch's outputs are ordered row, column, channel."""
        p, out = self.config.patch_size, self.proj_out(self.norm_out(h))  # [B, N, p*p*channels]
        out = out.view(h.shape[0], rows, columns, p, p, -1)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(h.shape[0], -1, rows * p, columns * p)


def check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Raises: ValueError naming the number that does not fit."""
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads: wanted a multiple of num_kv_heads={num_kv_heads}, got {num_heads}")
    if head_dim % 4:
        raise ValueError(f"head_dim: wanted a multiple of 4 for the 2-D RoPE, got {head_dim}")


class DiT(ImageTransformer):
    """Velocity network v(x_t, t, text).

    Args:
        strategy: how the LLM's layers are fused: b1 b2 b3 s1 s2 s3.
        depth, hidden_size, num_heads, num_kv_heads, head_dim, mlp_size: the transformer's sizes.
        in_channels, patch_size: latent channels and the side of a square patch.
        text_dim, text_layers: the LLM's width and number of layers; hidden states 1..text_layers are routed. b1 and b2
            accept None and then take the features' own number.
        rope_base: base of the image RoPE, and of the text RoPE if `text_rope`.
        norm_eps: eps of every RMSNorm.
        gate_input: "t", or "sigma" for gates that were trained on the noise level 1 - t.

    Raises: ValueError naming the argument.
    """

    zero3_leaves = (Conditioner, Block)  # they use parameters of their children, or are compiled whole
    _no_split_modules = ("Block",)

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
        text_dim: int,
        text_layers: int | None = None,
        rope_base: float = 1e5,
        text_rope: bool = True,
        norm_eps: float = 1e-6,
        gate_input: str = "t",
    ) -> None:
        super().__init__()
        check_heads(num_heads, num_kv_heads, head_dim)
        if gate_input not in ("t", "sigma"):
            raise ValueError(f"gate_input: wanted 't' or 'sigma', got {gate_input!r}")
        if text_layers is not None and text_layers < 2:
            raise ValueError(f"text_layers: wanted at least 2, got {text_layers}")
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.fusion = build_fusion(strategy, depth, text_layers)
        self.conditioner = Conditioner(
            depth, text_dim, num_kv_heads, head_dim, rope_base if text_rope else None, norm_eps
        )
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, num_kv_heads, head_dim, mlp_size, norm_eps) for _ in range(depth)
        )
        self.norm_out = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.proj_out = nn.Linear(hidden_size, patch_size * patch_size * in_channels)
        self.initialize()
        nn.init.normal_(self.conditioner.embed.weight, std=0.02)

    def reads(self, num_layers: int) -> dict[str, tuple[int, ...]]:
        """What to ask the text encoder for, as its own arguments, of an LLM with `num_layers` layers."""
        return {"layer_ids": layers_read(self.config.strategy, self.config.text_layers or num_layers)}

    def fusion_weights(self, gate_time: Tensor, num_layers: int | None = None) -> Tensor:
        """alpha [1|B, 1|D, L] at gate_time [B] in flow time (it may leave [0, 1])."""
        seen = gate_time if self.config.gate_input == "t" else sigma_of(gate_time)
        n = self.config.text_layers or num_layers
        if n is None:
            raise ValueError("num_layers: wanted the number of LLM layers, the model's text_layers is None")
        return self.fusion(seen, n)

    @apply_forward_hook  # a model that waits on the CPU comes for this as for `forward`
    def folded(self, text: TextFeatures, times: int) -> tuple[Tensor, Tensor] | None:
        """What `condition` may be given to be asked `times` times with these weights; None where folding is dearer."""
        rows = fused_states(self.config.strategy, self.config.depth)
        folds = self.conditioner.folds(text.cu_seqlens_host[-1], rows, times)
        return self.conditioner.folded() if folds else None

    @apply_forward_hook
    def condition(self, text: TextFeatures, gate_time: Tensor, folded: tuple[Tensor, Tensor] | None = None) -> TextKV:
        """Keys and values of all blocks from features; gate_time [B] or [1]. Nothing is sent to the device.

        Raises: ValueError naming the layers that are missing from the features.
        """
        n = self.config.text_layers or self._text_layers(text)
        text = text.select(layers_read(self.config.strategy, n))
        alpha = self.fusion_weights(gate_time, n)[..., text.layer_ids[0] - 1 : text.layer_ids[-1]]
        k, v = self.conditioner(text, alpha.to(text.mean.dtype), folded)
        return TextKV(k, v, text.cu_seqlens, text.cu_seqlens_host)

    def _text_layers(self, text: TextFeatures) -> int:
        """The LLM's layers where only the features tell: all of them, or b1's penultimate one alone."""
        alone = self.config.strategy == "b1" and len(text.layer_ids) == 1
        return max(text.layer_ids) + alone

    def forward(self, x: Tensor, t: Tensor, text: TextFeatures | TextKV, gate_time: Tensor | None = None) -> Tensor:
        """Velocity data - noise.

        Args:
            x: [B, in_channels, H, W] noised latents, H and W multiples of the patch.
            t: [B] or [1] flow time in [0, 1].
            text: features of B prompts, or their keys and values already made with `condition`.
            gate_time: what the gates see in place of t (eq. 11); ignored with a TextKV.

        Raises: ValueError naming the argument.
        """
        kv = text if isinstance(text, TextKV) else self.condition(text, t if gate_time is None else gate_time)
        h, rows, columns = self.patches(x, kv.batch)
        rope = image_rope(rows, columns, self.config.head_dim, self.config.rope_base, x.device)
        n = rows * columns
        cu_q = torch.arange(0, (x.shape[0] + 1) * n, n, dtype=torch.int32, device=x.device)
        # unbind, not indexing: its backward is one stack instead of D full-size additions
        for block, k, v in zip(self.blocks, kv.k.unbind(0), kv.v.unbind(0), strict=True):
            h = block(h, k, v, rope, cu_q, kv.cu_seqlens, kv.max_len)
        return self.picture(h, rows, columns)
