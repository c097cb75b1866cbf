"""The frozen text encoder: any Hugging Face causal LM (or the language model inside a vision-language one).

- packed: no padding is computed; attention runs through `sr_kernels.varlen_attention`
- no LM head is loaded, no layer above the highest one asked for is run
- prompts already seen come from a bounded cache keyed by their tokens and what is read; its answers do not depend on
  its history
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from sr_kernels import layer_stats, varlen_attention
from sr_model.flops import llm_products
from sr_model.text_features import TextFeatures, TextKV

ATTENTION = "sr_varlen"  # our name in transformers' attention registry


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface on packed sequences: [1, heads, T, hd] in, [1, T, heads, hd] out."""
    if scaling is not None:  # varlen_attention scales by hd^-0.5
        query = query * (scaling * query.shape[-1] ** 0.5)
    cu, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    if (taps := kwargs.get("taps")) is not None and module.layer_idx in taps:
        taps[module.layer_idx] = k, v  # [T, Hkv, hd]
    return varlen_attention(q, k, v, cu, cu, longest, longest, causal=True)[None], None


AttentionInterface.register(ATTENTION, _packed_attention)


def language_model(model: nn.Module) -> Any:
    """The decoder stack: a vision-language model's `language_model`, else the model itself.

    Raises: ValueError when there is no `layers` list (not a decoder-only LLM).
    """
    for candidate in (getattr(model, "language_model", None), getattr(model, "model", None), model):
        if isinstance(candidate, nn.Module) and isinstance(getattr(candidate, "layers", None), nn.ModuleList):
            return candidate
    raise ValueError(f"llm: wanted a decoder-only language model with a list of layers, got {type(model).__name__}")


class TextEncoder:
    """Prompts -> TextFeatures, or with `kv_layers` -> TextKV: the LLM's own keys and values.

    Args:
        llm: a transformers model; frozen here, its attention ours while it encodes.
        tokenizer: its tokenizer.
        layer_ids: hidden states to return, 1..num_layers (default all): n is the output of layer n, the last one after
            the final norm.
        kv_layers: in place of layer_ids, the layers, from 0, whose keys (normed and rotated) and values to return.
        template: text put before every prompt; a dropped prompt is the template alone.
        max_tokens: longer prompts are cut and counted in `truncated`.
        cache_bytes: memory the cache of encoded prompts may hold; 0 turns it off.

    Raises: ValueError naming the argument.
    """

    def __init__(
        self,
        llm: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layer_ids: Sequence[int] | None = None,
        kv_layers: Sequence[int] | None = None,
        template: str = "",
        max_tokens: int = 512,
        cache_bytes: int = 1 << 30,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens: wanted at least 1, got {max_tokens}")
        self.llm = language_model(llm).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.num_layers: int = len(self.llm.layers)
        self.read(layer_ids, kv_layers)
        self.template, self.max_tokens, self.cache_bytes = template, max_tokens, cache_bytes
        self.truncated = 0  # prompts cut at max_tokens so far
        self.encoded = 0  # prompts that went through the LLM so far
        self.flops = 0  # and the floating-point operations that took
        self._cache: OrderedDict[tuple[Any, ...], TextFeatures | TextKV] = OrderedDict()
        self._cached_bytes = 0

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, **kwargs: Any
    ) -> TextEncoder:
        """From a Hugging Face model name or folder; `kwargs` as in the constructor."""
        llm = AutoModel.from_pretrained(path, dtype=dtype or "auto")
        return cls(language_model(llm).to(device), AutoTokenizer.from_pretrained(path), **kwargs)

    def read(self, layer_ids: Sequence[int] | None = None, kv_layers: Sequence[int] | None = None) -> None:
        """Choose what is returned from now on, as in the constructor. Raises: ValueError for a layer not there."""
        self.kv_layers = None if kv_layers is None else tuple(kv_layers)
        if self.kv_layers is not None:
            if not self.kv_layers or min(self.kv_layers) < 0 or max(self.kv_layers) >= self.num_layers:
                raise ValueError(f"kv_layers: wanted layers in 0..{self.num_layers - 1}, got {list(self.kv_layers)}")
            self.layer_ids: tuple[int, ...] = ()
            self.layers_run = max(self.kv_layers) + 1
            return
        self.layer_ids = tuple(range(1, self.num_layers + 1)) if layer_ids is None else tuple(layer_ids)
        if not self.layer_ids or min(self.layer_ids) < 1 or max(self.layer_ids) > self.num_layers:
            raise ValueError(f"layer_ids: wanted ids in 1..{self.num_layers}, got {list(self.layer_ids)}")
        self.layers_run = max(self.layer_ids)

    @property
    def text_dim(self) -> int:
        """Width C of the hidden states."""
        return int(self.llm.config.hidden_size)

    def tokenize(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of template + prompt, cut at max_tokens; never empty (the pad or end token stands in)."""
        if isinstance(prompts, str):
            raise TypeError("prompts: wanted a list of strings, got one string")
        rows = self.tokenizer([self.template + prompt for prompt in prompts])["input_ids"]
        self.truncated += sum(len(row) > self.max_tokens for row in rows)
        spare = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        return [tuple(row[: self.max_tokens]) or (int(spare),) for row in rows]

    def encode(self, prompts: Sequence[str]) -> TextFeatures | TextKV:
        """Features of the prompts in their order, on the LLM's device and in its dtype; without gradient."""
        tokens = self.tokenize(prompts)
        if not self.cache_bytes:
            return self.encode_tokens(tokens)
        # One at a time: a prompt's bits must not depend on its neighbours, or a resumed run would differ from this one.
        weight = next(self.llm.parameters())
        asked = [(row, self.layer_ids, self.kv_layers, weight.device, weight.dtype) for row in tokens]
        fresh = {key: self.encode_tokens(key[:1]).clone() for key in dict.fromkeys(asked) if key not in self._cache}
        batch = []
        for key in asked:
            if key in self._cache:
                self._cache.move_to_end(key)
            batch.append(fresh[key] if key in fresh else self._cache[key])
        for key, features in fresh.items():
            self._keep(key, features)
        return (TextFeatures if self.kv_layers is None else TextKV).cat(batch)  # type: ignore[arg-type]

    def _keep(self, key: tuple[Any, ...], features: TextFeatures | TextKV) -> None:
        self._cache[key] = features
        self._cached_bytes += features.nbytes
        while self._cached_bytes > self.cache_bytes:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes

    @torch.no_grad()
    def encode_tokens(self, tokens: Sequence[tuple[int, ...]]) -> TextFeatures | TextKV:
        """Features of token rows, all in one packed sequence; past the cache."""
        device = next(self.llm.parameters()).device
        lengths = [len(row) for row in tokens]
        flat = torch.tensor([i for row in tokens for i in row], device=device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # hidden state, mean, rstd

        def keep(layer: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                hidden = (output[0] if isinstance(output, tuple) else output)[0]  # [T, C], the layer's own memory
                mean, rstd = layer_stats([hidden])  # now, while a GPU's cache still holds it
                kept[layer] = hidden, mean[0], rstd[0]

            return hook

        # hidden state n is the output of layer n, but the last one is taken after the final norm
        handles = [
            (self.llm.norm if i == self.num_layers else self.llm.layers[i - 1]).register_forward_hook(keep(i))
            for i in self.layer_ids
        ]
        layers, config = self.llm.layers, self.llm.config
        attention = config._attn_implementation
        self.llm.layers, config._attn_implementation = layers[: self.layers_run], ATTENTION
        taps: dict[int, Any] | None = None if self.kv_layers is None else dict.fromkeys(self.kv_layers)
        try:
            self.llm(
                input_ids=flat[None],
                position_ids=positions[None],
                use_cache=False,
                cu_seq_lens_q=bounds,
                cu_seq_lens_k=bounds,
                max_length_q=max(lengths),
                max_length_k=max(lengths),
                taps=taps,
            )
        finally:
            self.llm.layers, config._attn_implementation = layers, attention
            for handle in handles:
                handle.remove()
        self.encoded += len(tokens)
        self.flops += 2 * llm_products(self.llm.config, self.layers_run, lengths)
        if taps is not None:
            k, v = (torch.stack(part) for part in zip(*taps.values(), strict=True))  # [D, T, Hkv, hd]
            return TextKV.pack(k, v, lengths)
        hidden, means, rstds = zip(*(kept[i] for i in self.layer_ids), strict=True)
        return TextFeatures.pack(hidden, lengths, self.layer_ids, (torch.stack(means), torch.stack(rstds)))
