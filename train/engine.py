"""The DeepSpeed engine: its configuration, and the moving average of the fp32 master weights beside it."""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, set_z3_leaf_modules
from torch import Tensor

from sr_model import DiT
from train.config import Config


def learning_rate_factor(step: int, config: Config) -> float:
    """Multiple of optim.lr at a step: linear warm-up, then constant or a cosine down to 1/20."""
    optim = config.optim
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    if optim.schedule == "constant":
        return warm
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(step / config.steps, 1.0))))


def deepspeed_config(config: Config, world: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration. ZeRO stage 0 can only accumulate bf16 gradients in bf16; the others use fp32."""
    micro = config.micro_batch_size or config.batch_size // world
    settings: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.batch_size // (micro * world),
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {"stage": config.zero},
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }
    if bf16 and config.zero > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def build_engine(model: DiT, config: Config, world: int, bf16: bool) -> deepspeed.DeepSpeedEngine:
    """The model under DeepSpeed with AdamW and the learning-rate schedule; its blocks compiled where that pays."""
    if config.zero == 3:  # gather a leaf's parameters together, with no hook inside it
        set_z3_leaf_modules(model, model.zero3_leaves)
    device = next(model.parameters()).device
    if config.compile == "true" or (config.compile == "auto" and device.type == "cuda"):
        model.compile_blocks()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.optim.lr,
        betas=config.optim.betas,
        weight_decay=config.optim.weight_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.LambdaLR(
            opt, lambda step: learning_rate_factor(step, config)
        ),
        config=deepspeed_config(config, world, bf16),
        dist_init_required=False,
    )
    return engine


def master_partitions(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """This rank's own fp32 master weights, whatever the ZeRO stage: flat partitions, or whole parameters at stage 0."""
    sharded = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    if sharded is not None:
        return [p.data for p in sharded]
    return [p.data for group in engine.basic_optimizer.param_groups for p in group["params"]]


def full_master_state(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """fp32 master weights by parameter name, whole, on the CPU of every rank. A collective call."""
    named = list(engine.module.named_parameters())
    if engine.zero_optimization_stage() == 0:
        masters = [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
        return {name: p.detach().float().cpu().clone() for (name, _), p in zip(named, masters, strict=True)}
    return {name: safe_get_full_fp32_param(p).detach().float().cpu().clone() for name, p in named}


class Ema:
    """Moving average of the weights in fp32, sharded exactly as the optimiser's masters: no gather in training."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, decay: float) -> None:
        self.engine, self.decay, self.steps = engine, decay, 0
        self.shards = [p.clone() for p in master_partitions(engine)]

    @torch.no_grad()
    def update(self) -> None:
        """After an optimiser step. The decay ramps up from 0.1 so that the random start is forgotten early."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(self.shards, master_partitions(self.engine), 1 - decay)

    @torch.no_grad()
    def full_state(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name, whole, on the CPU of every rank. A collective call."""
        masters = master_partitions(self.engine)
        kept = [p.clone() for p in masters]
        torch._foreach_copy_(masters, self.shards)
        try:
            return full_master_state(self.engine)
        finally:
            torch._foreach_copy_(masters, kept)

    def state_dict(self) -> dict[str, Any]:
        """This rank's shards and the number of updates."""
        return {"shards": self.shards, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, on the same number of ranks at the same ZeRO stage."""
        torch._foreach_copy_(self.shards, [s.to(self.shards[0].device) for s in state["shards"]])
        self.steps = state["steps"]
