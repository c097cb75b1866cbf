"""The DeepSpeed engine: its configuration, and the moving average of the fp32 master weights beside it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    set_z3_leaf_modules,
)
from torch import Tensor

from sr_model import DiT
from sr_model.build import parameter_count
from train.config import Config

BUCKET = 500_000_000  # elements of the buffer that gradients are reduced in, where the model has more: DeepSpeed's own


def learning_rate_factor(step: int, config: Config) -> float:
    """Multiple of optim.lr at a step: linear warm-up, then constant or a cosine down to 1/20."""
    optim = config.optim
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    if optim.schedule == "constant":
        return warm
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(step / config.steps, 1.0))))


def deepspeed_config(config: Config, parameters: int, world: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration. ZeRO stage 0 can only accumulate bf16 gradients in bf16; the others use fp32."""
    micro = config.micro_batch_size or config.batch_size // world
    settings: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.batch_size // (micro * world),
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {"stage": config.zero, "reduce_bucket_size": min(BUCKET, parameters)},
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }
    if bf16 and config.zero > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _with_gradient(module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Before the conditioner: have its fusion weights take a gradient, also those of b1 and b2 that learn none.

    Where no input of a module takes one, ZeRO-3 frees the module's parameters before its backward pass needs them.
    """
    if not torch.is_grad_enabled() or arguments[1].requires_grad:
        return None
    return arguments[0], arguments[1].detach().requires_grad_(), *arguments[2:]


def build_engine(model: DiT, config: Config, world: int, bf16: bool) -> deepspeed.DeepSpeedEngine:
    """The model under DeepSpeed with AdamW and the learning-rate schedule; its blocks compiled where that pays."""
    if config.zero == 3:  # gather a leaf's parameters together, with no hook inside it
        set_z3_leaf_modules(model, model.zero3_leaves)
        if hasattr(model, "conditioner"):
            model.conditioner.register_forward_pre_hook(_with_gradient)
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
        config=deepspeed_config(config, parameter_count(model), world, bf16),
        dist_init_required=False,
    )
    return engine


def master_partitions(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """This rank's own fp32 master weights, whatever the ZeRO stage: flat partitions, or whole parameters at stage 0."""
    return [p.data for p in _masters(engine)]


def _masters(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """The keys of the optimiser's state."""
    sharded = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    return list(sharded or (p for group in engine.basic_optimizer.param_groups for p in group["params"]))


class FullState:
    """Masters and Adam moments of an engine as whole fp32 tensors by parameter name, at any ZeRO stage.

    `get` and `put` are collective calls: all ranks name the same parameter in the same order.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self.engine, self.stage = engine, engine.zero_optimization_stage()
        self.parameters = dict(engine.module.named_parameters())
        self.names = list(self.parameters)
        self.optimizer = engine.basic_optimizer
        self.whole: dict[str, Tensor] = {}  # stage 0: the optimiser's own tensors are whole
        if self.stage == 0:
            self.whole = dict(zip(self.names, _masters(engine), strict=True))
        self.linked = False

    def link(self) -> None:
        """Make the moments where no step has made them yet, and have DeepSpeed find each parameter's part of them."""
        if self.linked:
            return
        for master in _masters(self.engine):
            state = self.optimizer.state[master]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master.data), torch.zeros_like(master.data)
        if self.stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        self.linked = True

    def numel(self, name: str) -> int:
        """Elements of a parameter, also of one that ZeRO-3 has partitioned."""
        parameter = self.parameters[name]
        return int(getattr(parameter, "ds_numel", None) or parameter.numel())

    def get(self, name: str, kind: str = "master") -> Tensor:
        """ "master", "exp_avg" or "exp_avg_sq" of a parameter, whole."""
        if kind != "master":
            self.link()
        if self.stage == 0:
            master = self.whole[name]
            return master if kind == "master" else self.optimizer.state[master][kind]
        parameter = self.parameters[name]
        value = (
            safe_get_full_fp32_param(parameter) if kind == "master" else safe_get_full_optimizer_state(parameter, kind)
        )
        assert value is not None
        return value

    def put(self, name: str, kind: str, value: Tensor) -> None:
        """Set what `get` gives. After the last one call `refresh`."""
        if kind != "master":
            self.link()
        if self.stage == 0:
            master = self.whole[name]
            (master.data if kind == "master" else self.optimizer.state[master][kind]).copy_(value.view_as(master))
            return
        parameter = self.parameters[name]
        value = value.to(parameter.device)
        if kind == "master":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)
        if kind == "master" and self.stage < 3:
            parameter.data.copy_(value.view_as(parameter))

    @property
    def adam_step(self) -> float:
        """Adam's own count of steps."""
        return float(next(iter(self.optimizer.state.values()))["step"])

    @adam_step.setter
    def adam_step(self, count: float) -> None:
        for state in self.optimizer.state.values():
            state["step"] = torch.full_like(torch.as_tensor(state["step"], dtype=torch.float32), count)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the model's own weights those of the masters."""
        if self.stage == 0:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(self.whole[name])
        elif self.stage == 3:
            optimizer = self.engine.optimizer
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def full_master_state(
    engine: deepspeed.DeepSpeedEngine, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Copies of the master weights by parameter name, whole, on `device` of every rank. A collective call.

    Each is cast as it is gathered: no more than one is there in fp32 beside what is returned.
    """
    state = FullState(engine)
    return {name: state.get(name).detach().to(device, dtype, copy=True) for name in state.names}


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

    @contextlib.contextmanager
    def in_place_of_masters(self) -> Iterator[None]:
        """Inside, the engine's masters hold the average: what is gathered there is the average, whole."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange average and masters, a piece at a time: a copy of all of them may not fit."""
        for master, shard in zip(master_partitions(self.engine), self.shards, strict=True):
            for a, b in zip(master.view(-1).split(1 << 24), shard.view(-1).split(1 << 24), strict=True):
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)

    @torch.no_grad()
    def full_state(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The averaged weights, as `full_master_state` gives the masters. A collective call."""
        with self.in_place_of_masters():
            return full_master_state(self.engine, device, dtype)

    @torch.no_grad()
    def take_masters(self, steps: int) -> None:
        """Become what the masters are now, after so many updates."""
        torch._foreach_copy_(self.shards, master_partitions(self.engine))
        self.steps = steps
