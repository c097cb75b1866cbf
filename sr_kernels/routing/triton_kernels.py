"""Routing in Triton: the kernels. Launches and tile sizes are in `launch.py`, the reasons in the README.

`hidden` arrives either as one tensor (base pointer and `stride_l`) or as a table of L addresses; both become one
row pointer per layer. Row pointers are 64-bit, since L*T*C passes 2^31; offsets inside a row are 32-bit.
Layers are cut in two, BLOCK_L + REST_L (a power of two each, REST_L may be 0), so that 36 fill 48 places and not 64.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointer_table(table, layers):
    """Write the addresses of a tuple of L tensors to table [L] int64: on the device, so nothing waits on a copy."""
    for i in tl.static_range(len(layers)):
        tl.store(table + i, layers[i].to(tl.int64))


@triton.jit
def _bounds(cu_seqlens, b, samples, tokens):
    """Sample b's first and last + 1 token, kept inside 0..tokens and the ends at them: values on a GPU go unchecked."""
    start = tl.where(b == 0, 0, tl.maximum(tl.load(cu_seqlens + b), 0))
    end = tl.where(b == samples - 1, tokens, tl.minimum(tl.load(cu_seqlens + b + 1), tokens))
    return start, end


@triton.jit(do_not_specialize=["tokens"])
def token_map(cu_seqlens, sample, tokens, BLOCK: tl.constexpr):
    """Write each token's sample index: cu_seqlens [B+1] -> sample [T], both int32; one program a sample."""
    b = tl.program_id(0)
    first, end = _bounds(cu_seqlens, b, tl.num_programs(0), tokens)
    for start in range(first, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        tl.store(sample + token, tl.zeros([BLOCK], tl.int32) + b, mask=token < end)


@triton.jit
def _row(hidden, table, stride_l, stride_t, token, layer, L, TUPLE: tl.constexpr, ALIGN: tl.constexpr):
    """Pointer to hidden[layer, token, 0]; `layer` is a scalar or a vector, past L it is not to be read."""
    if TUPLE:
        address = tl.load(table + layer, mask=layer < L, other=0)
        start = tl.multiple_of(address.to(hidden.dtype), ALIGN)  # a loaded address hides its alignment
    else:
        start = hidden + tl.cast(layer, tl.int64) * stride_l
    return start + tl.cast(token, tl.int64) * stride_t


@triton.jit
def _per_layer(values, token, tokens, layer, L):
    """values [L, T] of one token for a vector of layers; 0 past L."""
    return tl.load(values + layer.to(tl.int64) * tokens + token, mask=layer < L, other=0.0)


@triton.jit
def _moments(x, c, m, channels, EVEN: tl.constexpr):
    """Sum and sum of squares of x - m over the channels that exist."""
    deviation = x - m
    if not EVEN:
        deviation = tl.where(c < channels, deviation, 0.0)
    return tl.sum(deviation, 0), tl.sum(deviation * deviation, 0)


@triton.jit(do_not_specialize=["tokens", "eps"])
def stats(
    hidden, table, mean, rstd, tokens, channels, eps, stride_l, stride_t,
    TUPLE: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, REST_C: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of one row, read once and kept in registers as BLOCK_C + REST_C channels."""
    token = tl.program_id(0)
    layer = tl.program_id(1)
    row = _row(hidden, table, stride_l, stride_t, token, layer, layer + 1, TUPLE, ALIGN)
    c0 = tl.arange(0, BLOCK_C)
    x0 = tl.load(row + c0, mask=(c0 < channels) | EVEN, other=0.0).to(tl.float32)
    total = tl.sum(x0, 0)
    if REST_C > 0:
        c1 = BLOCK_C + tl.arange(0, REST_C)
        x1 = tl.load(row + c1, mask=(c1 < channels) | EVEN, other=0.0).to(tl.float32)
        total += tl.sum(x1, 0)
    size = tl.cast(channels, tl.float32)
    m = tl.div_rn(total, size)
    error, square = _moments(x0, c0, m, channels, EVEN)
    if REST_C > 0:
        error1, square1 = _moments(x1, c1, m, channels, EVEN)
        error += error1
        square += square1
    # The corrected two-pass form: the residuals' own mean makes a constant row's mean exact, so its output is zero.
    error = tl.div_rn(error, size)
    variance = tl.maximum(tl.div_rn(square, size) - error * error, 0.0)
    at = layer.to(tl.int64) * tokens + token
    tl.store(mean + at, m + error)
    tl.store(rstd + at, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)))


@triton.jit
def _weight_tile(weights, layer, d, L: tl.constexpr, D: tl.constexpr):
    """weights [D, L] as a tile [layers, d], 0 past L and D."""
    inside = (layer[:, None] < L) & (d[None, :] < D)
    return tl.load(weights + d[None, :] * L + layer[:, None], mask=inside, other=0.0)


@triton.jit
def _forward_product(acc, h, m, r, w, PARTS: tl.constexpr):
    """acc [c, d] += LN(h [c, l]) . w [l, d]: fp16 operands in one part or two (|LN| <= sqrt(C)), or tf32x3 (0)."""
    x = (h.to(tl.float32) - m[None, :]) * r[None, :]
    if PARTS == 0:
        acc = tl.dot(x, w, acc, input_precision="tf32x3")
    else:
        x_high = x.to(tl.float16)
        w_high = w.to(tl.float16)
        if PARTS == 2:
            x_low = (x - x_high.to(tl.float32)).to(tl.float16)
            w_low = (w - w_high.to(tl.float32)).to(tl.float16)
            acc = tl.dot(x_low, w_high, acc)
            acc = tl.dot(x_high, w_low, acc)
        acc = tl.dot(x_high, w_high, acc)
    return acc


@triton.jit(do_not_specialize=["tokens"])
def route_dot(
    hidden, table, weights, mean, rstd, sample, out, sumsq,
    tokens, channels, stride_l, stride_t, stride_od, stride_ot,
    L: tl.constexpr, D: tl.constexpr, PER_SAMPLE: tl.constexpr, TUPLE: tl.constexpr, SUMSQ: tl.constexpr,
    EVEN: tl.constexpr, ALIGN: tl.constexpr, PARTS: tl.constexpr, BLOCK_L: tl.constexpr, REST_L: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Forward on tensor cores: one program makes TILES tiles of one token, [BLOCK_C x L] . [L x BLOCK_D] each."""
    token = tl.program_id(0)
    part = tl.program_id(1)
    if PER_SAMPLE:
        weights += tl.load(sample + token).to(tl.int64) * (D * L)
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    l0 = tl.arange(0, BLOCK_L)
    row0 = _row(hidden, table, stride_l, stride_t, token, l0, L, TUPLE, ALIGN)
    m0 = _per_layer(mean, token, tokens, l0, L)
    r0 = _per_layer(rstd, token, tokens, l0, L)
    w0 = _weight_tile(weights, l0, d, L, D)
    scale = tl.max(tl.abs(w0), 0)  # [d]: keeps weights of any size within fp16's range
    if REST_L > 0:
        l1 = BLOCK_L + tl.arange(0, REST_L)
        row1 = _row(hidden, table, stride_l, stride_t, token, l1, L, TUPLE, ALIGN)
        m1 = _per_layer(mean, token, tokens, l1, L)
        r1 = _per_layer(rstd, token, tokens, l1, L)
        w1 = _weight_tile(weights, l1, d, L, D)
        scale = tl.maximum(scale, tl.max(tl.abs(w1), 0))
    scale = tl.where(scale > 0, scale, 1.0)
    w0 = w0 / scale[None, :]
    if REST_L > 0:
        w1 = w1 / scale[None, :]
    squares = tl.zeros([BLOCK_C // 16, 8, BLOCK_D], tl.float32)
    target = out + d.to(tl.int64) * stride_od + token.to(tl.int64) * stride_ot
    for tile in tl.range(part * TILES, part * TILES + TILES, num_stages=STAGES):
        at = tile * BLOCK_C + c
        inside = (at < channels) | EVEN
        acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        h = tl.load(row0[None, :] + at[:, None], mask=inside[:, None] & (l0[None, :] < L), other=0.0)
        acc = _forward_product(acc, h, m0, r0, w0, PARTS)
        if REST_L > 0:
            h = tl.load(row1[None, :] + at[:, None], mask=inside[:, None] & (l1[None, :] < L), other=0.0)
            acc = _forward_product(acc, h, m1, r1, w1, PARTS)
        acc = acc * scale[None, :]
        if SUMSQ:
            # Rows 8 apart lie in one thread of a tensor-core tile, so no shuffles until the end.
            square = tl.where(inside[:, None], acc * acc, 0.0)
            squares += tl.sum(tl.reshape(square, [BLOCK_C // 16, 2, 8, BLOCK_D]), 1)
        value = acc.to(out.dtype.element_ty)
        tl.store(target[None, :] + at[:, None], value, mask=inside[:, None] & (d[None, :] < D))
    if SUMSQ:
        tl.store(sumsq + (part * D + d).to(tl.int64) * tokens + token, tl.sum(tl.sum(squares, 0), 0), mask=d < D)


@triton.jit(do_not_specialize=["tokens"])
def route_fma(
    hidden, table, weights, mean, rstd, sample, out, sumsq,
    tokens, channels, stride_l, stride_t, stride_ot,
    L: tl.constexpr, PER_SAMPLE: tl.constexpr, TUPLE: tl.constexpr, SUMSQ: tl.constexpr,
    EVEN: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Forward for one block (D = 1): plain fused multiply-adds; a group of layers' loads are in flight together."""
    token = tl.program_id(0)
    part = tl.program_id(1)
    if PER_SAMPLE:
        weights += tl.load(sample + token).to(tl.int64) * L
    c = tl.arange(0, BLOCK_C)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(part * TILES, part * TILES + TILES):
        at = tile * BLOCK_C + c
        inside = (at < channels) | EVEN
        acc = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, L, GROUP):
            for i in tl.static_range(GROUP):
                layer = start + i
                real = (L % GROUP == 0) | (layer < L)
                row = _row(hidden, table, stride_l, stride_t, token, layer, L, TUPLE, ALIGN)
                h = tl.load(row + at, mask=inside & real, other=0.0).to(tl.float32)
                at_stats = tl.cast(layer, tl.int64) * tokens + token
                w = tl.load(weights + layer, mask=real, other=0.0) * tl.load(rstd + at_stats, mask=real, other=0.0)
                acc += (h - tl.load(mean + at_stats, mask=real, other=0.0)) * w
        tl.store(out + token.to(tl.int64) * stride_ot + at, acc.to(out.dtype.element_ty), mask=inside)
        if SUMSQ:
            squares += tl.where(inside, acc * acc, 0.0)
    if SUMSQ:
        tl.store(sumsq + part.to(tl.int64) * tokens + token, tl.sum(squares, 0))


@triton.jit
def _share(cu_seqlens, tokens, PER_SAMPLE: tl.constexpr):
    """First and last + 1 token of this program: an equal share of sample program_id(1), or of all tokens."""
    part = tl.program_id(0)
    start = 0
    end = tokens
    if PER_SAMPLE:
        start, end = _bounds(cu_seqlens, tl.program_id(1), tl.num_programs(1), tokens)
    size = tl.cdiv(end - start, tl.num_programs(0))
    first = start + part * size
    return first, tl.minimum(first + size, end)


@triton.jit
def _backward_product(acc, h, g, m, r, inside, EVEN: tl.constexpr):
    """acc [l, d] += (h - m) [l, c] . g [c, d], h - m in two parts of g's dtype (for fp16 LN(h), to stay in range)."""
    x = h.to(tl.float32) - m[:, None]
    if not EVEN:
        x = tl.where(inside[None, :], x, 0.0)  # -m * rstd may pass fp16's range where there is no channel
    if g.dtype == tl.float32:
        acc = tl.dot(x, g, acc, input_precision="tf32x3")
    else:
        if g.dtype == tl.bfloat16:
            # The high part by truncation: bit operations run at full rate, single conversions at a quarter of it.
            bits = x.to(tl.uint32, bitcast=True)
            high = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
            low = (x - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)).to(tl.bfloat16)
        else:
            x *= r[:, None]
            high = x.to(tl.float16)
            low = (x - high.to(tl.float32)).to(tl.float16)
        acc = tl.dot(low, g, acc)
        acc = tl.dot(high, g, acc)
    return acc


@triton.jit(do_not_specialize=["tokens"])
def backward_dot(
    grad, hidden, table, mean, rstd, cu_seqlens, partial,
    tokens, channels, stride_l, stride_t, stride_gd, stride_gt,
    L: tl.constexpr, D: tl.constexpr, PER_SAMPLE: tl.constexpr, TUPLE: tl.constexpr,
    EVEN: tl.constexpr, ALIGN: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Weights gradient on tensor cores: one program sums a share of the tokens into partial [B, parts, D, L]."""
    l0 = tl.arange(0, BLOCK_L)
    d = tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_C)
    first, end = _share(cu_seqlens, tokens, PER_SAMPLE)
    total = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for token in range(first, end):
        row = _row(hidden, table, stride_l, stride_t, token, l0, L, TUPLE, ALIGN)
        source = grad + d.to(tl.int64) * stride_gd + tl.cast(token, tl.int64) * stride_gt
        m = _per_layer(mean, token, tokens, l0, L)
        r = _per_layer(rstd, token, tokens, l0, L)
        acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
        for tile in tl.range(TILES, num_stages=STAGES):
            at = tile * BLOCK_C + c
            inside = (at < channels) | EVEN
            h = tl.load(row[:, None] + at[None, :], mask=(l0[:, None] < L) & inside[None, :], other=0.0)
            g = tl.load(source[None, :] + at[:, None], mask=inside[:, None] & (d[None, :] < D), other=0.0)
            acc = _backward_product(acc, h, g, m, r, inside, EVEN)
        # Tokens are summed outside the tensor cores, whose long sums truncate.
        total += acc if grad.dtype.element_ty == tl.float16 else acc * r[:, None]
    at = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (D * L)
    tl.store(partial + at + d[None, :] * L + l0[:, None], total, mask=(l0[:, None] < L) & (d[None, :] < D))


@triton.jit
def _eights(x):
    """Sums of 8 neighbours along the last axis: what one thread holds of a 16-bit vector load, so no shuffles."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), 2)


@triton.jit(do_not_specialize=["tokens"])
def backward_fma(
    grad, hidden, table, mean, rstd, cu_seqlens, partial,
    tokens, channels, stride_l, stride_t, stride_gt,
    L: tl.constexpr, PER_SAMPLE: tl.constexpr, TUPLE: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_L: tl.constexpr, REST_L: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Weights gradient for one block (D = 1), without tensor cores; partial [B, parts, L]."""
    l0 = tl.arange(0, BLOCK_L)
    c = tl.arange(0, BLOCK_C)
    first, end = _share(cu_seqlens, tokens, PER_SAMPLE)
    total0 = tl.zeros([BLOCK_L], tl.float32)
    if REST_L > 0:
        l1 = BLOCK_L + tl.arange(0, REST_L)
        total1 = tl.zeros([REST_L], tl.float32)
    for token in range(first, end):
        row0 = _row(hidden, table, stride_l, stride_t, token, l0, L, TUPLE, ALIGN)
        m0 = _per_layer(mean, token, tokens, l0, L)
        acc0 = tl.zeros([BLOCK_L, BLOCK_C // 8], tl.float32)
        if REST_L > 0:
            row1 = _row(hidden, table, stride_l, stride_t, token, l1, L, TUPLE, ALIGN)
            m1 = _per_layer(mean, token, tokens, l1, L)
            acc1 = tl.zeros([REST_L, BLOCK_C // 8], tl.float32)
        for tile in tl.range(TILES, num_stages=STAGES):
            at = tile * BLOCK_C + c
            inside = (at < channels) | EVEN
            g = tl.load(grad + tl.cast(token, tl.int64) * stride_gt + at, mask=inside, other=0.0).to(tl.float32)
            h = tl.load(row0[:, None] + at[None, :], mask=(l0[:, None] < L) & inside[None, :], other=0.0)
            acc0 += _eights((h.to(tl.float32) - m0[:, None]) * g[None, :])
            if REST_L > 0:
                h = tl.load(row1[:, None] + at[None, :], mask=(l1[:, None] < L) & inside[None, :], other=0.0)
                acc1 += _eights((h.to(tl.float32) - m1[:, None]) * g[None, :])
        total0 += tl.sum(acc0, 1) * _per_layer(rstd, token, tokens, l0, L)
        if REST_L > 0:
            total1 += tl.sum(acc1, 1) * _per_layer(rstd, token, tokens, l1, L)
    at = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * L
    tl.store(partial + at + l0, total0, mask=l0 < L)
    if REST_L > 0:
        tl.store(partial + at + l1, total1, mask=l1 < L)


@triton.jit(do_not_specialize=["parts"])
def ordered_sum(partial, total, parts, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """partial [B, parts, width] -> total [B, width], always in the same order."""
    b = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, parts, ROWS):
        at = (b * parts + start + row)[:, None] * width + column[None, :]
        acc += tl.load(partial + at, mask=(start + row < parts)[:, None] & (column < width)[None, :], other=0.0)
    tl.store(total + b * width + column, tl.sum(acc, 0), mask=column < width)
