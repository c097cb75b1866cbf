"""The fusion strategies: convex weights over the LLM's layers, alpha [1|B, 1|D, L], as a function of a gate time.

Everything else in the model is the same for all of them. `forward(gate_time [B] or [1], num_layers)` returns fp32
weights over hidden states 1..num_layers that sum to one (eq. 3); the last dimension follows the layers' order.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_DIM = 128  # D_t of eq. 12
GATE_HIDDEN = 4 * TIME_DIM


def time_embedding(t: Tensor) -> Tensor:
    """phi(t) of eq. 12: t [B] in [0, 1], not scaled -> [B, 128] fp32: 64 cosines, then 64 sines."""
    half = TIME_DIM // 2
    i = torch.arange(half, device=t.device, dtype=torch.float32)
    angles = t.float()[:, None] * torch.exp(i * (-math.log(10000.0) / half))  # [B, 64]
    return torch.cat([angles.cos(), angles.sin()], -1)


def wide(x: Tensor) -> Tensor:
    """x in fp32 at least: weights over layers are computed in it whatever the parameters' dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Penultimate(nn.Module):
    """b1, eq. 4: the penultimate layer alone."""

    def forward(self, gate_time: Tensor, num_layers: int) -> Tensor:
        at = torch.arange(1, num_layers + 1, device=gate_time.device)
        return (at == num_layers - 1).float()[None, None]  # [1, 1, L]


class Uniform(nn.Module):
    """b2, eq. 5: the average of all layers."""

    def forward(self, gate_time: Tensor, num_layers: int) -> Tensor:
        return torch.full((1, 1, num_layers), 1 / num_layers, device=gate_time.device)


class Static(nn.Module):
    """b3 (eq. 6, one vector of logits) and s2 (eq. 9, one for each block)."""

    def __init__(self, rows: int, num_layers: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(rows, num_layers))

    def forward(self, gate_time: Tensor, num_layers: int) -> Tensor:
        return wide(self.logits).softmax(-1)[None]  # [1, rows, L]


class TimeGate(nn.Module):
    """s1 (eq. 8, one gate) and s3 (eq. 10, one for each block): the TCFG of eq. 7 and Appendix A, all gates batched."""

    def __init__(self, rows: int, num_layers: int) -> None:
        super().__init__()
        self.in_weight = nn.Parameter(torch.empty(rows, GATE_HIDDEN, TIME_DIM))
        self.in_bias = nn.Parameter(torch.zeros(rows, GATE_HIDDEN))
        self.out_weight = nn.Parameter(torch.zeros(rows, num_layers, GATE_HIDDEN))  # zero: uniform weights at first
        self.out_bias = nn.Parameter(torch.zeros(rows, num_layers))
        for weight in self.in_weight.detach().unbind():  # per gate, so that the fans are those of one Linear
            nn.init.xavier_uniform_(weight)

    def forward(self, gate_time: Tensor, num_layers: int) -> Tensor:
        weight = wide(self.in_weight)
        phi = time_embedding(gate_time).to(weight.dtype)  # [B, 128]
        h = torch.einsum("bi,rhi->brh", phi, weight) + wide(self.in_bias)
        z = torch.einsum("brh,rlh->brl", F.silu(h), wide(self.out_weight)) + wide(self.out_bias)
        return z.softmax(-1)  # [B, rows, L]


FUSIONS = ("b1", "b2", "b3", "s1", "s2", "s3")
STRATEGIES = (*FUSIONS, "fusedit")  # the last fuses nothing: it taps the LLM's keys and values (sr_model/fusedit.py)
STATIC_IN_TIME = ("b1", "b2", "b3", "s2")  # their keys and values can be kept over all sampling steps


def layers_read(strategy: str, num_layers: int) -> tuple[int, ...]:
    """The hidden states a strategy needs of an LLM with `num_layers` layers: what to ask the text encoder for."""
    return (num_layers - 1,) if strategy == "b1" else tuple(range(1, num_layers + 1))


def fused_states(strategy: str, depth: int) -> int:
    """How many different fused states the text has for `depth` blocks: one, or one a block."""
    return depth if strategy in ("s2", "s3") else 1


def build_fusion(strategy: str, depth: int, num_layers: int | None) -> nn.Module:
    """The strategy's module for `depth` blocks over `num_layers` LLM layers (None only for b1 and b2).

    Raises: ValueError naming the strategy or the missing number of layers.
    """
    if strategy not in FUSIONS:
        raise ValueError(f"strategy: wanted one of {', '.join(FUSIONS)}, got {strategy!r}")
    if strategy == "b1":
        return Penultimate()
    if strategy == "b2":
        return Uniform()
    if num_layers is None:
        raise ValueError(f"text_layers: wanted the number of LLM layers for strategy {strategy!r}, got None")
    rows = fused_states(strategy, depth)
    return (Static if strategy in ("b3", "s2") else TimeGate)(rows, num_layers)


def centre_and_dispersion(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the layer's place i / (L - 1) under weights alpha [..., L] (eq. 14-17): each [...] fp32."""
    p = wide(alpha)
    p = p / p.sum(-1, keepdim=True)
    place = torch.linspace(0, 1, p.shape[-1], device=p.device, dtype=p.dtype)
    centre = (p * place).sum(-1)
    return centre, (p * (place - centre[..., None]).square()).sum(-1)
