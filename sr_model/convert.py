"""Import of checkpoints in the authors' released format.

That format has no text RoPE, gates on the noise level 1 - t, and a velocity of noise - data: all of it becomes
configuration or a change of sign here, so that the model itself knows one convention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from sr_model.dit import DiT
from sr_model.fusedit import FuseDiT, rope_theta
from sr_model.fusion import STRATEGIES

BLOCK_KEYS = {
    "norm1.weight": "input_layernorm.weight",
    "self_attn.q_norm": "self_attn.q_norm.weight",
    "self_attn.k_norm": "self_attn.k_norm.weight",
    "self_attn.q_proj.weight": "self_attn.q_proj.weight",
    "self_attn.k_proj.weight": "self_attn.k_proj.weight",
    "self_attn.v_proj.weight": "self_attn.v_proj.weight",
    "self_attn.o_proj.weight": "self_attn.o_proj.weight",
    "cross_attn.q_norm": "cross_attn.q_norm.weight",
    "cross_attn.q_proj.weight": "cross_attn.q_proj.weight",
    "cross_attn.o_proj.weight": "cross_attn.o_proj.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}
TOP_KEYS = {
    "patch_embed.weight": "patch_embed.proj.weight",
    "patch_embed.bias": "patch_embed.proj.bias",
    "conditioner.norm.weight": "context_embedder.0.weight",
    "conditioner.embed.weight": "context_embedder.1.weight",
    "conditioner.embed.bias": "context_embedder.1.bias",
    "norm_out.weight": "norm_out.weight",
}
GATE_KEYS = {"in_weight": "0.weight", "in_bias": "0.bias", "out_weight": "2.weight", "out_bias": "2.bias"}


def read_state(source: Mapping[str, Tensor] | str | Path) -> dict[str, Tensor]:
    """The tensors of a state dict, a .safetensors or torch file, or a folder of .safetensors shards.

    Raises: FileNotFoundError, ValueError for a folder without shards or a file that cannot be read.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if path.is_dir():
        shards = sorted(path.glob("*.safetensors"))
        if not shards:
            raise ValueError(f"path: wanted a folder with .safetensors files, found none in {path}")
        return {key: value for shard in shards for key, value in read_state(shard).items()}
    if not path.is_file():
        raise FileNotFoundError(f"path: no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"path: wanted a .safetensors or torch file, cannot read {path}: {reason}") from None


def _strategy_of(state: Mapping[str, Tensor], strategy: str | None) -> str:
    """The strategy the fusion tensors show; b1 and b2 carry none, so the caller names them."""
    shown = None
    if "text_fusion_weight" in state:
        shown = "b3"
    elif "text_fusion_weights.0" in state:
        shown = "s2"
    elif "text_fusion_module.weight_generator.0.weight" in state:
        shown = "s1"
    elif "text_fusion_modules.0.weight_generator.0.weight" in state:
        shown = "s3"
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy: wanted one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if strategy == "fusedit":
        raise ValueError("strategy: the checkpoint has no dit.* and llm.* tensors, got 'fusedit'")
    if shown is None and strategy not in ("b1", "b2"):
        raise ValueError(f"strategy: the checkpoint has no fusion tensors, wanted 'b1' or 'b2', got {strategy!r}")
    if shown is not None and strategy not in (None, shown):
        raise ValueError(f"strategy: the checkpoint's tensors are those of {shown!r}, got {strategy!r}")
    return shown or str(strategy)


def load_authors_checkpoint(
    source: Mapping[str, Tensor] | str | Path,
    strategy: str | None = None,
    llm_config: Any = None,
    first_layer: int | None = None,
) -> DiT | FuseDiT:
    """A DiT or FuseDiT from a released checkpoint, on the CPU in the checkpoint's dtype.

    Args:
        source: a state dict, or the path of a .safetensors or torch file or of a folder of shards.
        strategy: needed for b1 and b2, whose checkpoints hold no fusion tensors; else checked against the tensors.
        llm_config: the LLM's transformers config. Needed for fusedit (RoPE base, eps, layers); its number of layers is
            taken where the tensors do not tell (b1, b2).
        first_layer: the LLM layer, from 0, that block 0 taps; for fusedit alone, default as in `FuseDiT`. The language
            model in such a checkpoint is read by `load_authors_llm`.

    Raises: ValueError naming the key or argument that is missing, unknown, or of the wrong size.
    """
    state = read_state(source)
    if "dit.patch_embed.proj.weight" in state:
        if strategy not in (None, "fusedit"):
            raise ValueError(f"strategy: the checkpoint's tensors are those of 'fusedit', got {strategy!r}")
        inner = {key.removeprefix("dit."): value for key, value in state.items() if not key.startswith("llm.")}
        return _fusedit(inner, llm_config, first_layer)
    if "patch_embed.proj.weight" not in state or "layers.0.self_attn.q_proj.weight" not in state:
        raise ValueError(
            "source: not in the authors' released format (no patch_embed.proj.weight and layers.0.* tensors); "
            f"it has {len(state)} tensors, the first named {next(iter(sorted(state)), None)!r}"
        )
    if first_layer is not None:
        raise ValueError(f"first_layer: only for joint-attention checkpoints, got {first_layer}")
    strategy = _strategy_of(state, strategy)
    depth = _depth(state)

    def size(key: str, dim: int) -> int:
        if key not in state:
            raise ValueError(f"source: the tensor {key} is missing")
        if state[key].ndim <= dim or not state[key].numel():
            raise ValueError(f"source: {key} wants more dimensions, the checkpoint gives {list(state[key].shape)}")
        return state[key].shape[dim]

    def gates(prefix: str) -> dict[str, Tensor]:
        names = [prefix] if strategy == "s1" else [f"{prefix}.{d}" for d in range(depth)]
        return {ours: stack(f"{n}.weight_generator.{k}" for n in names) for ours, k in GATE_KEYS.items()}

    head_dim = size("layers.0.self_attn.q_norm.weight", 0)
    layers = getattr(getattr(llm_config, "text_config", llm_config), "num_hidden_layers", None)
    if strategy in ("b3", "s2"):
        layers = size("text_fusion_weight" if strategy == "b3" else "text_fusion_weights.0", 0)
    elif strategy in ("s1", "s3"):
        prefix = "text_fusion_module" if strategy == "s1" else "text_fusion_modules.0"
        layers = size(f"{prefix}.weight_generator.2.bias", 0)
    with torch.device("meta"):
        model = DiT(
            strategy=strategy,
            depth=depth,
            hidden_size=size("patch_embed.proj.weight", 0),
            num_heads=size("layers.0.self_attn.q_proj.weight", 0) // head_dim,
            num_kv_heads=size("layers.0.self_attn.k_proj.weight", 0) // head_dim,
            head_dim=head_dim,
            mlp_size=size("layers.0.mlp.gate_proj.weight", 0),
            in_channels=size("patch_embed.proj.weight", 1),
            patch_size=size("patch_embed.proj.weight", 2),
            text_dim=size("context_embedder.1.weight", 0),
            text_layers=layers,
            rope_base=1e4 if strategy in ("b1", "b2") else 1e5,
            text_rope=False,
            gate_input="sigma",
        )

    def pop(key: str) -> Tensor:
        if key not in state:
            raise ValueError(f"source: the tensor {key} is missing")
        return state.pop(key)

    def stack(keys: Iterable[str]) -> Tensor:
        tensors = {key: pop(key) for key in keys}
        first, shape = next((key, list(tensor.shape)) for key, tensor in tensors.items())
        for key, tensor in tensors.items():
            if list(tensor.shape) != shape:
                raise ValueError(f"source: {key} has shape {list(tensor.shape)}, {first} {shape}: wanted them alike")
        return torch.stack(list(tensors.values()))

    ours = {name: pop(key) for name, key in TOP_KEYS.items()}
    for d in range(depth):
        ours |= {f"blocks.{d}.{name}": pop(f"layers.{d}.{key}") for name, key in BLOCK_KEYS.items()}
    kv = stack(f"layers.{d}.cross_attn.text_{x}_proj.weight" for d in range(depth) for x in "kv")  # [2D, Hkv*hd, C]
    ours["conditioner.kv_weight"] = kv.unflatten(0, (depth, 2)).flatten(1, 2)
    ours["conditioner.k_norm"] = stack(f"layers.{d}.cross_attn.k_norm.weight" for d in range(depth))
    ours["proj_out.weight"] = -pop("proj_out.weight")  # their velocity is noise - data
    ours["proj_out.bias"] = -pop("proj_out.bias")
    if strategy == "b3":
        ours["fusion.logits"] = pop("text_fusion_weight")[None]
    elif strategy == "s2":
        ours["fusion.logits"] = stack(f"text_fusion_weights.{d}" for d in range(depth))
    elif strategy in ("s1", "s3"):
        prefix = "text_fusion_module" if strategy == "s1" else "text_fusion_modules"
        ours |= {f"fusion.{name}": value for name, value in gates(prefix).items()}
    _assign(model, ours, state)
    return model


def _depth(state: Mapping[str, Tensor]) -> int:
    """Number of blocks. Raises: ValueError where there are none."""
    depth = 1 + max((int(m[1]) for key in state if (m := re.match(r"layers\.(\d+)\.", key))), default=-1)
    if not depth:
        raise ValueError("source: the checkpoint has no layers.* tensors")
    return depth


def _assign(model: nn.Module, ours: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> None:
    """Give a model on the meta device its tensors. Raises: ValueError for a leftover tensor or another size."""
    if rest:
        raise ValueError(f"source: {len(rest)} unknown tensors, the first named {min(rest)!r}")
    for name, parameter in model.named_parameters():
        if ours[name].shape != parameter.shape:
            raise ValueError(
                f"source: {name} wants shape {list(parameter.shape)}, the checkpoint gives {list(ours[name].shape)}"
            )
    model.load_state_dict(ours, assign=True)


def _fusedit(state: dict[str, Tensor], llm_config: Any, first_layer: int | None) -> FuseDiT:
    """The dit.* tensors, their prefix removed."""
    if llm_config is None:
        raise ValueError("llm_config: wanted the LLM's transformers config for a 'fusedit' checkpoint, got None")
    config = getattr(llm_config, "text_config", llm_config)
    depth = _depth(state)

    def pop(key: str) -> Tensor:
        if key not in state:
            raise ValueError(f"source: the tensor dit.{key} is missing")
        return state.pop(key)

    top = {name: key for name, key in TOP_KEYS.items() if not name.startswith("conditioner")}
    ours = {name: pop(key) for name, key in top.items()}
    blocks = {name: key for name, key in BLOCK_KEYS.items() if not name.startswith("cross_attn")}
    for d in range(depth):
        ours |= {f"blocks.{d}.{name}": pop(f"layers.{d}.{key}") for name, key in blocks.items()}
    ours["proj_out.weight"] = -pop("proj_out.weight")  # their velocity is noise - data
    ours["proj_out.bias"] = -pop("proj_out.bias")
    head_dim, patch = ours["blocks.0.self_attn.q_norm"].shape[0], ours["patch_embed.weight"]
    with torch.device("meta"):
        model = FuseDiT(
            strategy="fusedit",
            depth=depth,
            hidden_size=patch.shape[0],
            num_heads=ours["blocks.0.self_attn.q_proj.weight"].shape[0] // head_dim,
            num_kv_heads=ours["blocks.0.self_attn.k_proj.weight"].shape[0] // head_dim,
            head_dim=head_dim,
            mlp_size=ours["blocks.0.mlp.gate_proj.weight"].shape[0],
            in_channels=patch.shape[1],
            patch_size=patch.shape[2],
            text_layers=config.num_hidden_layers,
            first_layer=first_layer,
            rope_base=rope_theta(config),
            norm_eps=config.rms_norm_eps,
        )
    _assign(model, ours, state)
    return model


def load_authors_llm(source: Mapping[str, Tensor] | str | Path, llm_config: Any) -> PreTrainedModel:
    """The frozen language model (decoder stack, llm.* tensors) of a released fusedit checkpoint, in its dtype.

    Raises: ValueError naming a tensor that is missing, unknown, or of the wrong size.
    """
    state = {k.removeprefix("llm."): v for k, v in read_state(source).items() if k.startswith("llm.")}
    if not state:
        raise ValueError("source: no llm.* tensors; only fusedit checkpoints hold their language model")
    model = AutoModel.from_config(getattr(llm_config, "text_config", llm_config)).eval()  # its RoPE tables are computed
    names = dict(model.named_parameters())
    if missing := sorted(set(names) - set(state)):
        raise ValueError(f"source: the tensor llm.{missing[0]} is missing")
    rest = {f"llm.{key}": state[key] for key in sorted(set(state) - set(names))}
    _assign(model, state, rest)
    return model
