"""What the frozen LLM hands the model: the real tokens at every asked-for layer, packed, with their statistics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sr_kernels import layer_stats


@dataclass(frozen=True)
class TextFeatures:
    """Packed LLM hidden states of B prompts with T tokens in all. Make one with `pack`, `from_padded` or `cat`.

    hidden: [L, T, C], or a tuple of L tensors [T, C].
    layer_ids: which hidden state each of the L is; 0 is the embedding, n the output of layer n (the last one after the
        LLM's final norm).
    cu_seqlens: [B+1] int32 on hidden's device; cu_seqlens_host: the same numbers as integers.
    mean, rstd: [L, T] fp32, LayerNorm statistics (eq. 2), taken once.
    """

    hidden: Tensor | tuple[Tensor, ...]
    layer_ids: tuple[int, ...]
    cu_seqlens: Tensor
    cu_seqlens_host: tuple[int, ...]
    mean: Tensor
    rstd: Tensor

    @classmethod
    def pack(
        cls,
        hidden: Tensor | tuple[Tensor, ...],
        lengths: Sequence[int],
        layer_ids: Sequence[int] | None = None,
        stats: tuple[Tensor, Tensor] | None = None,
    ) -> TextFeatures:
        """From packed states and the prompts' lengths; `layer_ids` defaults to 1..L.

        Raises: ValueError when a prompt has no token, the lengths do not add up to T, or ids and layers differ.
        """
        n_layers = len(hidden)
        first = hidden[0]
        ids = tuple(range(1, n_layers + 1)) if layer_ids is None else tuple(layer_ids)
        if len(ids) != n_layers:
            raise ValueError(f"layer_ids: wanted {n_layers} ids, one a layer of hidden, got {len(ids)}")
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths: wanted at least one token in every prompt, got {list(lengths)}")
        bounds = (0, *itertools.accumulate(lengths))
        if bounds[-1] != first.shape[0]:
            raise ValueError(f"lengths: wanted a sum of {first.shape[0]} tokens, got {bounds[-1]}")
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32).to(first.device, non_blocking=True)
        mean, rstd = layer_stats(hidden) if stats is None else stats
        return cls(hidden, ids, cu_seqlens, bounds, mean, rstd)

    @classmethod
    def from_padded(cls, hidden: Tensor, mask: Tensor, layer_ids: Sequence[int] | None = None) -> TextFeatures:
        """From padded states [L, B, N, C] and a mask [B, N], non-zero at real tokens (on either side)."""
        if hidden.ndim != 4 or mask.ndim != 2 or hidden.shape[1:3] != mask.shape:
            raise ValueError(
                f"hidden, mask: wanted [L, B, N, C] and [B, N], got {list(hidden.shape)} and {list(mask.shape)}"
            )
        keep = mask.bool()
        return cls.pack(hidden[:, keep], keep.sum(1).tolist(), layer_ids)

    @classmethod
    def cat(cls, parts: Sequence[TextFeatures]) -> TextFeatures:
        """One batch from several with the same layers; the statistics are carried over, not taken again."""
        if any(part.layer_ids != parts[0].layer_ids for part in parts):
            raise ValueError("parts: wanted the same layer_ids in all")
        stats = torch.cat([p.mean for p in parts], 1), torch.cat([p.rstd for p in parts], 1)
        hidden = torch.cat([p.stacked for p in parts], 1)
        return cls.pack(hidden, [n for p in parts for n in p.lengths], parts[0].layer_ids, stats)

    def select(self, layer_ids: Sequence[int]) -> TextFeatures:
        """The same prompts at some of the layers only; one layer is a view.

        Raises: ValueError naming the layers that are missing.
        """
        wanted = tuple(layer_ids)
        if wanted == self.layer_ids:
            return self
        if missing := [i for i in wanted if i not in self.layer_ids]:
            raise ValueError(f"text: wanted hidden states {missing}, the features hold {list(self.layer_ids)}")
        rows = [self.layer_ids.index(i) for i in wanted]
        return TextFeatures(
            tuple(self.hidden[r] for r in rows),
            wanted,
            self.cu_seqlens,
            self.cu_seqlens_host,
            torch.stack([self.mean[r] for r in rows]),
            torch.stack([self.rstd[r] for r in rows]),
        )

    def split(self) -> list[TextFeatures]:
        """One TextFeatures a prompt; views."""
        hidden = self.stacked
        return [
            TextFeatures.pack(hidden[:, a:b], [b - a], self.layer_ids, (self.mean[:, a:b], self.rstd[:, a:b]))
            for a, b in itertools.pairwise(self.cu_seqlens_host)
        ]

    def clone(self) -> TextFeatures:
        """Own memory, hidden as one tensor: what a cache keeps."""
        hidden = self.hidden.clone() if isinstance(self.hidden, Tensor) else self.stacked
        return TextFeatures.pack(hidden, self.lengths, self.layer_ids, (self.mean.clone(), self.rstd.clone()))

    def double(self) -> TextFeatures:
        """The same features in fp64 with fp64 statistics: for reference runs."""
        return TextFeatures.pack(self.stacked.double(), self.lengths, self.layer_ids)

    @property
    def stacked(self) -> Tensor:
        """hidden as one tensor [L, T, C]; a copy if it is a tuple."""
        return self.hidden if isinstance(self.hidden, Tensor) else torch.stack(self.hidden)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [b - a for a, b in itertools.pairwise(self.cu_seqlens_host)]

    @property
    def batch(self) -> int:
        """Number of prompts B."""
        return len(self.cu_seqlens_host) - 1

    @property
    def width(self) -> int:
        """The LLM's width C."""
        return int(self.hidden[0].shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of hidden states and statistics."""
        layers = [self.hidden] if isinstance(self.hidden, Tensor) else self.hidden
        return sum(x.numel() * x.element_size() for x in (*layers, self.mean, self.rstd))

    def positions(self) -> Tensor:
        """Each token's place in its own prompt: [T] int64."""
        starts, total = self.cu_seqlens[:-1], self.cu_seqlens_host[-1]
        start = torch.repeat_interleave(starts, self.cu_seqlens.diff(), output_size=total)
        return torch.arange(total, device=start.device) - start


@dataclass(frozen=True)
class TextKV:
    """Keys and values of every block's attention to the text: all a block sees of it.

    k, v: [D, T, Hkv, hd] (k after its norm and RoPE); cu_seqlens: [B+1] int32; cu_seqlens_host: the same as integers.
    joint: what sr_model.fusedit keeps of them between sampling steps.
    """

    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    cu_seqlens_host: tuple[int, ...]
    joint: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def pack(cls, k: Tensor, v: Tensor, lengths: Sequence[int]) -> TextKV:
        """From packed keys and values and the prompts' lengths."""
        bounds = (0, *itertools.accumulate(lengths))
        return cls(k, v, torch.tensor(bounds, dtype=torch.int32).to(k.device, non_blocking=True), bounds)

    @classmethod
    def cat(cls, parts: Sequence[TextKV]) -> TextKV:
        """One batch from several."""
        k, v = (torch.cat([getattr(part, name) for part in parts], 1) for name in "kv")
        return cls.pack(k, v, [n for part in parts for n in part.lengths])

    def clone(self) -> TextKV:
        """Own memory: what a cache keeps."""
        return TextKV.pack(self.k.clone(), self.v.clone(), self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [b - a for a, b in itertools.pairwise(self.cu_seqlens_host)]

    @property
    def batch(self) -> int:
        """Number of prompts B."""
        return len(self.cu_seqlens_host) - 1

    @property
    def max_len(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.k.nbytes + self.v.nbytes

    def take(self, places: Places) -> TextKV:
        """The keys and values of these prompts of the batch."""
        if places.rows is None:
            return self
        k, v = (part.index_select(1, places.rows) for part in (self.k, self.v))
        return TextKV(k, v, places.cu_seqlens, places.cu_seqlens_host)


@dataclass(frozen=True)
class Places:
    """Which prompts of a packed batch to take: each any number of times, in any order. Make one with `of`.

    rows: their tokens' rows, on the device; None where it is the whole batch as it is. The rest as in TextFeatures.
    """

    rows: Tensor | None
    cu_seqlens: Tensor
    cu_seqlens_host: tuple[int, ...]

    @classmethod
    def of(cls, batch: TextFeatures | TextKV, prompts: Sequence[int]) -> Places:
        """The prompts by their places in `batch`."""
        if tuple(prompts) == tuple(range(batch.batch)):
            return cls(None, batch.cu_seqlens, batch.cu_seqlens_host)
        spans = [batch.cu_seqlens_host[i : i + 2] for i in prompts]
        bounds = (0, *itertools.accumulate(b - a for a, b in spans))
        device = batch.cu_seqlens.device
        rows = torch.tensor([row for a, b in spans for row in range(a, b)]).to(device, non_blocking=True)
        return cls(rows, torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True), bounds)
