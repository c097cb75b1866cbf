"""The lines a run prints before it starts: what it found, what it chose and why, what it will need."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sr_kernels.attention import backend_for as attention_backend
from sr_kernels.attention.op import usable as attention_reasons
from sr_kernels.routing import backend_for as routing_backend
from sr_kernels.routing import native
from sr_model import DiT, FuseDiT
from sr_model.build import parameter_count
from sr_model.fusion import fused_states
from train.checkpoint import PARAMETER_BYTES
from train.config import Config, ConfigError, DataConfig
from train.data import Part, sizes
from train.distributed import Ranks

GIB = 1 << 30
TEXT_TOKENS = 128  # of a caption, for the estimate


def training_bytes(parameters: int, zero: int, world: int, bf16: bool) -> int:
    """Bytes of weights, gradients, masters, Adam's moments and the average on one rank, activations not counted."""
    weights = parameters * (2 if bf16 else 4)
    gradients = parameters * 4
    optimizer = parameters * (4 * 2 + 4 + (4 if bf16 else 0))  # moments, average, and masters under bf16
    share = [1, 1, 1, 1] if zero == 0 else [1 / world if zero >= stage else 1 for stage in (3, 2, 1, 1)]
    return round(weights * share[0] + gradients * share[1] + optimizer * share[2])


def activation_bytes(checkpointing: str, dit: DiT | FuseDiT, tokens: int, itemsize: int) -> int:
    """Roughly what compiled blocks keep of `tokens` image tokens for the backward pass; a mode of `CHECKPOINTING`."""
    c: Any = dit.config
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    products = 3 * c.hidden_size + 4 * heads + 2 * kv + 3 * c.mlp_size  # outputs of matrix products and attention
    a_token = {
        "none": products + 5 * c.hidden_size + 2 * c.mlp_size,  # norms, residuals and SwiGLU's factors too
        "selective": products + c.hidden_size,
        "full": c.hidden_size,
    }[checkpointing]
    return tokens * c.depth * a_token * itemsize


def text_bytes(dit: DiT | FuseDiT, tokens: int, itemsize: int) -> int:
    """Roughly what `tokens` of text take: the layers that are read, fused states, keys and values with their norm."""
    c: Any = dit.config
    kv = c.depth * 2 * c.num_kv_heads * c.head_dim
    if c.strategy == "fusedit":
        return 2 * tokens * kv * itemsize
    read = len(dit.reads(c.text_layers)["layer_ids"])
    return tokens * (c.text_dim * (read + fused_states(c.strategy, c.depth)) + 3 * kv) * itemsize


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: what is there at every step (weights, gradients, optimiser, frozen models), what a sample of
    the micro-batch adds, and the room for both.
    """

    fixed: int
    sample: int
    room: int

    def fits(self, micro: int) -> bool:
        """Whether so many samples leave a tenth of the room for what is not counted."""
        return self.fixed + micro * self.sample <= 0.9 * self.room


def memory(
    config: Config, ranks: Ranks, dit: DiT | FuseDiT, factor: int, dtype: torch.dtype, frozen: int,
    found: Sequence[tuple[int, int]],
) -> Memory:  # fmt: skip
    """The estimate. dit, factor, frozen: as in `check`; found: the images' sizes."""
    unit = factor * dit.config.patch_size
    tokens = max(width // unit * (height // unit) for width, height in found)
    sample = activation_bytes(config.gradient_checkpointing, dit, tokens, dtype.itemsize)
    sample += text_bytes(dit, min(TEXT_TOKENS, config.text.max_tokens), dtype.itemsize)
    fixed = training_bytes(parameter_count(dit), config.zero, ranks.world, dtype == torch.bfloat16) + frozen
    if ranks.device.type == "cuda":
        return Memory(fixed, sample, torch.cuda.get_device_properties(ranks.device).total_memory)
    return Memory(fixed, sample, host_bytes())


def host_bytes() -> int:
    """This rank's share of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ["LOCAL_WORLD_SIZE"])


def micro_batch(config: Config, ranks: Ranks, need: Memory, parameters: int) -> int:
    """micro_batch_size, or where that is not given the most samples that fit and divide a rank's share of the batch.

    Raises: ConfigError when the batch does not divide over the ranks, or weights and optimiser or one micro-batch do
    not fit.
    """
    share = config.batch_size // ranks.world
    micro = config.micro_batch_size or next((n for n in range(share, 1, -1) if share % n == 0 and need.fits(n)), 1)
    if not share or config.batch_size % (micro * ranks.world):
        raise ConfigError(
            f"batch_size: wanted a multiple of {ranks.world} ranks x micro_batch_size "
            f"{config.micro_batch_size or 'at least 1'}, got {config.batch_size}"
        )
    if need.fixed > need.room:
        raise ConfigError(
            f"model: {parameters:,} parameters need {need.fixed / GIB:.0f} GiB of weights and optimiser on each of "
            f"{ranks.world} ranks at ZeRO stage {config.zero}, of {need.room / GIB:.0f} GiB; take a higher --zero, "
            "more ranks, or a smaller model"
        )
    if need.fixed + micro * need.sample > need.room:
        raise ConfigError(
            f"micro_batch_size: {micro} samples need about {micro * need.sample / GIB:.0f} GiB beside the "
            f"{need.fixed / GIB:.0f} GiB of weights and optimiser, of {need.room / GIB:.0f} GiB; take fewer, or "
            "--gradient_checkpointing selective or full"
        )
    return micro


def shards_line(data: DataConfig, parts: Sequence[Part], moments: bool, batch: int) -> str:
    """What is trained on: samples and shards, corpora by share, sizes that fill batches or do not, columns."""
    samples, shards, size = (sum(getattr(p.index, key) for p in parts) for key in ("samples", "shards", "bytes"))
    source = parts[0].source
    notes = []
    if source.remote:
        limit = f" up to {source.cache_bytes / GIB:g} GiB" if source.cache_bytes else ""
        notes.append(f"kept in {source.folder.parent if len(parts) > 1 else source.folder}{limit}")
    if data.mix:
        total = sum(data.mix.values())
        notes.append("mixed " + ", ".join(f"{path} {100 * w / total:.3g}%" for path, w in data.mix.items()))
    if len(found := sizes(parts)) > 1:
        held = {s: sum(p.index.samples for p in parts if p.size == s) for s in found}
        notes.append("sizes " + ", ".join(f"{w}x{h} {n:,}" for (w, h), n in held.items()))
        if few := [f"{w}x{h}" for (w, h), n in held.items() if n < batch]:
            notes.append(f"never trained on, with fewer samples than a batch: {', '.join(few)}")
    if list(data.captions) != ["caption"]:
        total = sum(data.captions.values())
        notes.append("captions " + ", ".join(f"{name} {100 * w / total:.3g}%" for name, w in data.captions.items()))
    if moments:
        notes.append("moments in place of the VAE's encoder")
    if not all(part.index.hashed for part in parts):
        notes.append("the index has no hashes: only sizes are checked")
    where = "the mix" if data.mix else data.path if len(parts) > 1 else source
    return "; ".join([f"{samples:,} samples in {shards} shards, {size / GIB:.2f} GiB of {where}", *notes])


def backends_line(device: torch.device, dtype: torch.dtype) -> str:
    """Which kernels run, and why not a faster one. Builds the native routing kernel if that is the one."""
    attention, routing = attention_backend(device, dtype), routing_backend(device, dtype=dtype)
    faster = next(iter(attention_reasons(device.type, dtype).items()))
    why = "" if faster[0] == attention else f" (no {faster[0]}: {faster[1]})"
    slow = f" (no native kernel: {native.why_not()})" if routing == "reference" and device.type == "cpu" else ""
    return f"attention {attention}{why}, routing {routing}{slow}"


def check(
    config: Config, ranks: Ranks, dit: DiT | FuseDiT, factor: int, dtype: torch.dtype, text: str, frozen: int,
    parts: Sequence[Part], moments: bool,
) -> tuple[int, list[str]]:  # fmt: skip
    """The micro-batch and the lines, and the last checks that need a device, before the model is made: collective.

    dit: the model on the meta device. factor: pixels to a latent's pixel. frozen: bytes of the LLM and the VAE, which
    are there already. parts: of the training split. moments: they are trained on.

    Raises: ConfigError as `micro_batch` does, or when the copy that async_save writes from does not fit.
    """
    parameters, device = parameter_count(dit), ranks.device
    need = memory(config, ranks, dit, factor, dtype, frozen, sizes(parts))
    need = replace(need, room=min(ranks.gather(need.room)))  # all must take the same micro-batch, or refuse
    micro = micro_batch(config, ranks, need, parameters)
    samples = micro * need.sample
    where = f"CPU, {torch.get_num_threads()} threads x {ranks.world} ranks"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)} x {ranks.world}"
    copy = PARAMETER_BYTES * parameters / ranks.world if config.async_save else 0
    host = min(ranks.gather(host_bytes()))
    if copy > (left := host - (need.fixed + samples if device.type == "cpu" else 0)):
        raise ConfigError(
            f"async_save: {copy / GIB:.1f} GiB of memory for the copy of a rank's share do not fit in {left / GIB:.1f} "
            "GiB; leave it off"
        )
    config.folder.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(config.folder).free
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    name = str(dtype).removeprefix("torch.")
    nodes = f" on {ranks.nodes} nodes" if ranks.nodes > 1 else ""
    return micro, [
        f"device     {where}{nodes}; {name}, fp32 masters; ZeRO {config.zero}; batch {config.batch_size} = "
        f"{ranks.world} ranks x {micro} x {config.batch_size // (micro * ranks.world)} micro-steps",
        f"model      {config.strategy}, {parameters:,} parameters; {text}",
        f"backends   {backends_line(device, dtype)}",
        f"memory     {need.fixed / GIB:.1f} GiB of weights, LLM and optimiser a rank, about {samples / GIB:.1f} GiB of "
        f"activations, of {need.room / GIB:.0f} GiB"
        + (f"; {copy / GIB:.1f} GiB of the CPU's to save from" if copy else ""),
        f"data       {shards_line(config.data, parts, moments, config.batch_size)}",
        f"room       {disk / GIB:.0f} GiB on disk for {config.keep_checkpoints} checkpoints, "
        f"{shm / GIB:.1f} GiB of shared memory",
    ]
