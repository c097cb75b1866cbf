"""Launches of the Triton routing kernels: tile sizes as a pure function of shape, dtype and architecture."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from sr_kernels import checks
from sr_kernels.routing import triton_kernels as kernels
from sr_kernels.routing.reference import LN_EPS

MAX_LAYERS = 64  # one tile holds every layer
MAX_BLOCKS = 64  # and every block
MAX_CHANNELS = 32768  # a row is held in one warp group's registers while its statistics are taken
MULTIPROCESSORS = {8: 108, 9: 132, 10: 148}  # by major compute capability: how many programs to share the work among
PARTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # operand parts that keep the error at the output's
TABLES: dict[tuple[object, ...], Tensor] = {}


@dataclass(frozen=True)
class Launch:
    """Tile sizes of one kernel; `parts` programs share a token's channels (forward) or a sample's tokens (backward)."""

    block_c: int
    tiles: int
    warps: int
    parts: int = 1
    stages: int = 1
    block_l: int = 0
    rest_l: int = 0
    block_d: int = 0
    rest_c: int = 0
    group: int = 0
    registers: int | None = None

    def options(self) -> dict[str, object]:
        """The compiler's options; contraction into fused multiply-adds is on whatever Triton's default."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers, "enable_fp_fusion": True}


def _power(n: int, least: int = 1) -> int:
    return max(triton.next_power_of_2(n), least)


def _layer_blocks(n_layers: int) -> tuple[int, int]:
    """Two powers of two that hold the layers in multiples of 16, the tensor cores' depth: 36 -> 32 + 16."""
    if 32 < n_layers <= 48:
        return 32, 16
    return _power(n_layers, 16), 0


@functools.lru_cache(1024)
def stats_launch(channels: int) -> Launch:
    """A row as BLOCK_C + REST_C channels, powers of two: 2560 = 2048 + 512."""
    block = 1 << (channels.bit_length() - 1)
    rest = _power(channels - block) if channels > block else 0
    return Launch(block_c=block, rest_c=rest, tiles=1, warps=max(1, min(16, _power(channels) // 4096)))


@functools.lru_cache(1024)
def forward_launch(dtype: torch.dtype, n_layers: int, blocks: int, channels: int, tokens: int, arch: int) -> Launch:
    """Forward: tiles of one token; the channels are shared out only where there are too few tokens to fill the GPU."""
    half = dtype.itemsize == 2
    block_c = 512 if blocks == 1 else _tensor_core_channels(128 if half else 64, dtype, arch)
    tiles = triton.cdiv(channels, block_c)
    wanted = min(tiles, triton.cdiv(8 * MULTIPROCESSORS.get(arch // 10, 132), tokens))
    parts = next(n for n in range(wanted, tiles + 1) if tiles % n == 0)
    if blocks == 1:
        group = triton.cdiv(n_layers, triton.cdiv(n_layers, 12))  # even groups of at most 12 layers
        # Left alone the compiler saves registers by waiting for each load in turn; 96 keep a whole group in flight.
        return Launch(block_c, tiles // parts, warps=2 if half else 4, parts=parts, group=group, registers=96)
    block_l, rest_l = _layer_blocks(n_layers)
    warps = 8 if arch >= 100 else 4  # Blackwell keeps a whole row of the tile in each thread
    return Launch(block_c, tiles // parts, warps, parts, 3, block_l, rest_l, _power(blocks, 16))


@functools.lru_cache(1024)
def backward_launch(
    dtype: torch.dtype, n_layers: int, blocks: int, channels: int, tokens: int, samples: int, arch: int
) -> Launch:
    """Gradient: `parts` programs a sample, enough for two waves, at least 8 where one sample is much the longest."""
    half = dtype.itemsize == 2
    wanted = max(8, triton.cdiv(8 * MULTIPROCESSORS.get(arch // 10, 132), samples))
    parts = min(wanted, triton.cdiv(tokens, samples))
    if blocks == 1:
        block_c = 256 if half else 128
        return Launch(block_c, triton.cdiv(channels, block_c), 4, parts, 3, *_layer_blocks(n_layers))
    block_c = _tensor_core_channels(64 if half else 32, dtype, arch)
    return Launch(
        block_c, triton.cdiv(channels, block_c), 4, parts, 4, _power(n_layers, 16), block_d=_power(blocks, 16)
    )


def _tensor_core_channels(channels: int, dtype: torch.dtype, arch: int) -> int:
    """Half the tile for fp32 on Ampere, whose three-part products would spill at 64 layers and blocks."""
    return channels // 2 if dtype == torch.float32 and arch < 90 else channels


def stats_constants(launch: Launch, channels: int) -> dict[str, object]:
    """Compile-time arguments of `stats`, besides those of `hidden`."""
    return {"EVEN": channels == launch.block_c + launch.rest_c, "BLOCK_C": launch.block_c, "REST_C": launch.rest_c}


def forward_constants(
    launch: Launch, dtype: torch.dtype, n_layers: int, blocks: int, channels: int, *, per_sample: bool, sumsq: bool
) -> dict[str, object]:
    """Compile-time arguments of `route_fma` (one block) or `route_dot`, besides those of `hidden`."""
    even = channels == launch.block_c * launch.tiles * launch.parts
    common = {
        "L": n_layers, "PER_SAMPLE": per_sample, "SUMSQ": sumsq, "EVEN": even, "BLOCK_C": launch.block_c,
        "TILES": launch.tiles,
    }  # fmt: skip
    if blocks == 1:
        return {**common, "GROUP": launch.group}
    return {
        **common, "D": blocks, "PARTS": PARTS[dtype], "BLOCK_L": launch.block_l, "REST_L": launch.rest_l,
        "BLOCK_D": launch.block_d, "STAGES": launch.stages,
    }  # fmt: skip


def backward_constants(
    launch: Launch, n_layers: int, blocks: int, channels: int, *, per_sample: bool
) -> dict[str, object]:
    """Compile-time arguments of `backward_fma` (one block) or `backward_dot`, besides those of `hidden`."""
    common = {
        "L": n_layers, "PER_SAMPLE": per_sample, "EVEN": channels == launch.block_c * launch.tiles,
        "BLOCK_L": launch.block_l, "BLOCK_C": launch.block_c, "TILES": launch.tiles, "STAGES": launch.stages,
    }  # fmt: skip
    return {**common, "REST_L": launch.rest_l} if blocks == 1 else {**common, "D": blocks, "BLOCK_D": launch.block_d}


def check(layers: list[Tensor], blocks: int = 1) -> None:
    """Raise a ValueError that names the argument for what the tiles cannot hold or a row pointer cannot reach."""
    first = layers[0]
    n_layers = len(layers) if first.ndim == 2 else first.shape[0]
    if first.dtype not in PARTS:
        checks.fail("hidden", "dtype float32, float16 or bfloat16 with the triton backend", first.dtype)
    if n_layers > MAX_LAYERS:
        checks.fail("hidden", f"at most {MAX_LAYERS} layers with the triton backend", n_layers)
    if first.shape[-1] > MAX_CHANNELS:
        checks.fail("hidden", f"at most {MAX_CHANNELS} channels with the triton backend", first.shape[-1])
    if blocks > MAX_BLOCKS:
        checks.fail("weights", f"at most {MAX_BLOCKS} blocks with the triton backend", blocks)
    stride = first.stride(-2)
    for i, layer in enumerate(layers):
        if layer.stride(-2) != stride:
            checks.fail(f"hidden[{i}]", f"row stride {stride} (that of hidden[0])", layer.stride(-2))


@functools.lru_cache
def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return 90  # the interpreter follows the launches of the main target
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _table(layers: list[Tensor], addresses: tuple[int, ...]) -> Tensor:
    """The layers' addresses [L] int64 on the device. Kept on its default stream, where a later call sees the write.

    CUDA graphs are captured, and warmed up by torch.compile, on other streams: there the write must be in the graph and
    the memory go back to its pool, so nothing is kept.
    """
    device = layers[0].device
    kept = device.type != "cuda" or torch.cuda.current_stream(device).cuda_stream == 0
    key = (device, addresses)
    table = TABLES.get(key) if kept else None
    if table is None:
        table = torch.empty(len(layers), dtype=torch.int64, device=device)
        kernels.pointer_table[(1,)](table, tuple(layers), num_warps=1, enable_fp_fusion=True)
        if kept:
            if len(TABLES) >= 64:
                TABLES.clear()
            TABLES[key] = table
    return table


def _hidden(layers: list[Tensor]) -> dict[str, object]:
    """The kernel arguments that say where `hidden` lies; run on its device."""
    first = layers[0]
    stride = first.stride(-2)
    if first.ndim == 3:  # the launcher looks at the alignment itself
        return {
            "hidden": first, "table": None, "stride_l": first.stride(0), "stride_t": stride, "TUPLE": False, "ALIGN": 16
        }  # fmt: skip
    size = first.element_size()
    addresses = tuple([x.data_ptr() for x in layers])
    aligned = stride * size % 16 == 0 and not any(address % 16 for address in addresses)
    return {
        "hidden": first, "table": _table(layers, addresses), "stride_l": 0, "stride_t": stride, "TUPLE": True,
        "ALIGN": 16 if aligned else size,
    }  # fmt: skip


def layer_stats(layers: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and rstd, two of [L, T] fp32, of hidden in the op's list form."""
    check(layers)
    first = layers[0]
    n_layers, tokens, channels = len(layers) if first.ndim == 2 else first.shape[0], first.shape[-2], first.shape[-1]
    mean = torch.empty(n_layers, tokens, dtype=torch.float32, device=first.device)
    rstd = torch.empty_like(mean)
    launch = stats_launch(channels)
    with _on(first.device):
        kernels.stats[(tokens, n_layers)](
            **_hidden(layers), mean=mean, rstd=rstd, tokens=tokens, channels=channels, eps=LN_EPS,
            **stats_constants(launch, channels), **launch.options(),
        )  # fmt: skip
    return mean, rstd


def route(
    layers: list[Tensor],
    weights: Tensor,
    mean: Tensor,
    rstd: Tensor,
    cu_seqlens: Tensor | None,
    sumsq: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [D, T, C] in hidden's dtype (written to `out` if given) and sum over c of out^2 [D, T] fp32 or empty."""
    check(layers, weights.shape[-2])
    first = layers[0]
    device, tokens, channels = first.device, first.shape[-2], first.shape[-1]
    blocks, n_layers = weights.shape[-2:]
    launch = forward_launch(first.dtype, n_layers, blocks, channels, tokens, _arch(device))
    if out is None:
        out = torch.empty(blocks, tokens, channels, dtype=first.dtype, device=device)
    squares = mean.new_empty((launch.parts, blocks, tokens) if sumsq else 0)
    with _on(device):
        sample = None
        if weights.ndim == 3:
            assert cu_seqlens is not None
            sample = torch.empty(tokens, dtype=torch.int32, device=device)
            kernels.token_map[(weights.shape[0],)](
                cu_seqlens.contiguous(), sample, tokens, BLOCK=256, enable_fp_fusion=True
            )
        strides = {"stride_ot": out.stride(1)} | ({} if blocks == 1 else {"stride_od": out.stride(0)})
        kernel = kernels.route_fma if blocks == 1 else kernels.route_dot
        kernel[(tokens, launch.parts)](
            **_hidden(layers), **strides, weights=weights.contiguous(), mean=mean.contiguous(), rstd=rstd.contiguous(),
            sample=sample, out=out, sumsq=squares if sumsq else None, tokens=tokens, channels=channels,
            **forward_constants(
                launch, first.dtype, n_layers, blocks, channels, per_sample=sample is not None, sumsq=sumsq
            ),
            **launch.options(),
        )  # fmt: skip
    if sumsq:
        squares = squares.sum(0) if launch.parts > 1 else squares[0]
    return out, squares


def route_backward(grad: Tensor, layers: list[Tensor], mean: Tensor, rstd: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Gradient of the weights, [D, L] or [B, D, L] fp32, in a fixed order of sums."""
    check(layers, grad.shape[0])
    first = layers[0]
    device, tokens, channels = first.device, first.shape[-2], first.shape[-1]
    blocks, n_layers = grad.shape[0], mean.shape[0]
    samples = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    launch = backward_launch(first.dtype, n_layers, blocks, channels, tokens, samples, _arch(device))
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()  # an expanded gradient, of a plain sum
    partial = mean.new_empty(samples, launch.parts, blocks, n_layers)
    shape = (blocks, n_layers) if cu_seqlens is None else (samples, blocks, n_layers)
    total = mean.new_empty(shape)
    with _on(device):
        strides = {"stride_gt": grad.stride(1)} | ({} if blocks == 1 else {"stride_gd": grad.stride(0)})
        kernel = kernels.backward_fma if blocks == 1 else kernels.backward_dot
        per_sample = cu_seqlens is not None
        kernel[(launch.parts, samples)](
            **_hidden(layers), **strides, grad=grad, mean=mean.contiguous(), rstd=rstd.contiguous(),
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(), partial=partial, tokens=tokens,
            channels=channels, **backward_constants(launch, n_layers, blocks, channels, per_sample=per_sample),
            **launch.options(),
        )  # fmt: skip
        width = blocks * n_layers
        kernels.ordered_sum[(triton.cdiv(width, 32), samples)](
            partial, total, launch.parts, width, ROWS=min(128, _power(launch.parts)), COLUMNS=32, enable_fp_fusion=True
        )
    return total
