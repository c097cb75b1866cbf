"""The Triton kernels' values against fp64. `test_routing_triton.py` runs this file in a process of its own.

On a GPU the kernels run compiled; without one, under Triton's interpreter, whose bf16 is repaired below.
"""

import os

import numpy as np
import pytest
import torch
import triton.language as tl
from test_routing import bounds, exact_norm, exact_route, relative

from sr_kernels import layer_stats, route
from sr_kernels.routing import launch, triton_kernels

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def repair_interpreter():
    """Round to bf16 to nearest, and multiply bf16 matrices as floats: the interpreter truncates and takes integers."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, src, to):
        kinds = (src.dtype.scalar, to.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return cast(self, src, to)

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = cast_impl(self, a, tl.float32), cast_impl(self, b, tl.float32)
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot


if DEVICE == "cpu":
    repair_interpreter()


@pytest.fixture(autouse=True)
def poison():
    """Outputs and scratch start as NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def hidden_of(kind, n_layers, tokens, channels, dtype):
    g = torch.Generator().manual_seed(n_layers * 1000 + tokens)
    hidden = torch.randn(n_layers, tokens, channels, generator=g) * 2 + 0.3
    if kind == "outlier":
        hidden[..., channels // 2] = 1e4
    elif kind == "far mean":
        hidden = torch.randn(n_layers, tokens, channels, generator=g) + 300
    elif kind == "constant row":
        hidden[n_layers // 2, tokens // 2] = 300.1
    elif kind == "equal layer":
        hidden[n_layers // 2] = -7.3
        hidden[-1] = hidden[0]
    return hidden.to(dtype)


def weights_of(kind, shape):
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(shape, generator=g)
    if kind == "one-hot":
        return torch.nn.functional.one_hot(logits.argmax(-1), shape[-1]).float()
    return (logits * {"soft": 1, "near one-hot": 20}[kind]).softmax(-1)


def check(dtype, n_layers, lengths, channels, blocks, *, per_sample=True, as_tuple=False, kind="", weights="soft"):
    """Forward, row factors and gradient of one case against fp64."""
    tokens = sum(lengths)
    hidden = hidden_of(kind, n_layers, tokens, channels, dtype)
    w = weights_of(weights, (*((len(lengths),) if per_sample else ()), blocks, n_layers))
    oracle_w = w.double().requires_grad_()  # [(B,) D, L]
    oracle = exact_route(hidden, oracle_w, lengths)
    placed, w = hidden.to(DEVICE), w.to(DEVICE).requires_grad_()
    out, sumsq = route(
        tuple(placed.unbind()) if as_tuple else placed,
        w,
        cu_seqlens=bounds(lengths).to(DEVICE) if per_sample else None,
        return_sumsq=True,
        backend="triton",
    )
    ideal = relative(oracle.to(dtype), oracle)
    far = kind == "far mean"  # the fp32 mean itself is then off by 300 * 2^-25 deviations
    assert relative(out.cpu(), oracle) <= ((2e-5 if far else 2e-6) if dtype == torch.float32 else 1.1 * ideal)
    # Taken from the sums before rounding: bf16's operands carry fp16's 11 bits.
    limit = 5e-4 if dtype == torch.bfloat16 else 2e-5 if far else 2e-6
    assert relative(sumsq.cpu(), oracle.square().sum(-1)) < limit
    grad = torch.randn(oracle.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(grad.to(DEVICE))
    oracle.backward(grad.double())
    assert relative(w.grad.cpu(), oracle_w.grad) < 5e-5
    if per_sample:
        assert all(not w.grad[b].any() for b, n in enumerate(lengths) if n == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n_layers", "lengths", "channels", "blocks", "options"),
    [
        (36, [1, 0, 1], 150, 24, {"as_tuple": True}),  # an empty sample, a last tile that is part full
        (36, [1], 256, 24, {"per_sample": False}),  # exact tiles
        (37, [1, 1], 70, 1, {"as_tuple": True}),
        (36, [0, 2], 512, 1, {}),
        (1, [1], 5, 1, {"per_sample": False}),
        (5, [3], 33, 17, {"per_sample": False, "as_tuple": True}),
        (64, [1], 96, 64, {}),
    ],
)
def test_shapes(dtype, n_layers, lengths, channels, blocks, options):
    check(dtype, n_layers, lengths, channels, blocks, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [1, 24])
@pytest.mark.parametrize("kind", ["outlier", "far mean", "constant row", "equal layer"])
def test_adversarial_hidden(dtype, blocks, kind):
    check(dtype, 36, [2], 140, blocks, per_sample=False, kind=kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [1, 24])
@pytest.mark.parametrize("weights", ["near one-hot", "one-hot"])
def test_adversarial_weights(dtype, blocks, weights):
    check(dtype, 36, [1, 1], 130, blocks, weights=weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [1, 4])
def test_a_constant_row_is_zero_and_a_huge_weight_is_not_lost(dtype, blocks):
    hidden = torch.full((3, 2, 100), 300.1).to(dtype)
    hidden[1] = torch.randn(2, 100, generator=torch.Generator().manual_seed(3)).to(dtype)
    weights = torch.tensor([[0.0, 0.0, 1e5]] + [[1e-9, 1e-9, 1e-9]] * (blocks - 1))
    out = route(hidden.to(DEVICE), weights.to(DEVICE), backend="triton").cpu()
    assert not out[0].any()
    if blocks > 1 and dtype != torch.float16:  # 1e-9 is below fp16's range
        assert relative(out[1], exact_route(hidden, weights)[1]) < (2e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("channels", [1, 7, 64, 100, 2560])
@pytest.mark.parametrize("kind", ["", "outlier", "far mean"])
def test_statistics(channels, kind):
    hidden = hidden_of(kind, 2, 3, channels, torch.float32)
    mean, rstd = layer_stats(hidden.to(DEVICE), backend="triton")
    assert relative(mean.cpu(), hidden.double().mean(-1)) < 2e-7
    assert relative(rstd.cpu(), (hidden.double().var(-1, unbiased=False) + 1e-5).rsqrt()) < 5e-7
    as_tuple = layer_stats(tuple(hidden.to(DEVICE).unbind()), backend="triton")
    assert torch.equal(mean, as_tuple[0])
    assert torch.equal(rstd, as_tuple[1])


def far_apart(outer, inner, stride):
    """A [outer, *inner] fp16 tensor whose first stride passes 2^31 elements; untouched pages cost nothing."""
    size = (outer - 1) * stride + inner[0] * inner[1]
    if DEVICE == "cpu":
        buffer = torch.from_numpy(np.empty(size, np.float16))
    else:
        buffer = torch.empty(size, dtype=torch.half, device=DEVICE)
    return buffer.as_strided((outer, *inner), (stride, inner[1], 1))


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("stride", [160, 2**31 + 160])
def test_both_index_widths(blocks, stride):
    generator = torch.Generator().manual_seed(0)
    hidden = far_apart(2, (2, 80), stride)
    hidden.copy_(torch.randn(2, 2, 80, generator=generator))
    weights = torch.rand(blocks, 2, generator=generator).to(DEVICE)
    small = hidden.cpu().contiguous()
    mean, rstd = launch.layer_stats([hidden])
    out = far_apart(2, (2, 80), stride)[:blocks]
    launch.route([hidden], weights, mean, rstd, None, False, out)
    exact = exact_route(small, weights.cpu())
    assert relative(out.cpu(), exact) <= 1.1 * relative(exact.half(), exact)
    total = launch.route_backward(out, [hidden], mean, rstd, None)
    exact_grad = torch.einsum("dtc,ltc->dl", out.cpu().double(), exact_norm(small))
    assert relative(total.cpu(), exact_grad) < 5e-5


def test_two_runs_give_the_same_bits():
    hidden = hidden_of("", 20, 3, 140, torch.bfloat16).to(DEVICE)
    results = []
    for _ in range(2):
        weights = weights_of("soft", (5, 20)).to(DEVICE).requires_grad_()
        out, sumsq = route(hidden, weights, return_sumsq=True, backend="triton")
        (out.float().sin().sum() + sumsq.sum()).backward()
        results.append((out, sumsq, weights.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_shares_cover_every_token():
    weights = weights_of("soft", (2, 3, 4))
    lengths, channels = [19, 3], 16
    hidden = hidden_of("", 4, 22, channels, torch.float32)
    grad = torch.randn(3, 22, channels, generator=torch.Generator().manual_seed(2))
    mean, rstd = layer_stats(hidden.to(DEVICE), backend="triton")
    total = launch.route_backward(grad.to(DEVICE), [hidden.to(DEVICE)], mean, rstd, bounds(lengths).to(DEVICE))
    xhat = exact_norm(hidden)
    per_sample = [
        torch.einsum("dtc,ltc->dl", g.double(), x)
        for g, x in zip(grad.split(lengths, 1), xhat.split(lengths, 1), strict=True)
    ]
    assert total.shape == weights.shape
    assert relative(total.cpu(), torch.stack(per_sample)) < 2e-6


@pytest.mark.parametrize(
    ("hidden", "weights", "message"),
    [
        (torch.ones(65, 1, 4), torch.ones(2, 65), "hidden: wanted at most 64 layers"),
        (torch.ones(2, 1, 4), torch.ones(65, 2), "weights: wanted at most 64 blocks"),
        (torch.ones(2, 1, 32769), torch.ones(2, 2), "hidden: wanted at most 32768 channels"),
    ],
)
def test_what_the_tiles_cannot_hold_is_named(hidden, weights, message):
    stats = tuple(torch.zeros(2, weights.shape[-1], 1, device=DEVICE))
    with pytest.raises(ValueError, match=message):
        route(hidden.to(DEVICE), weights.to(DEVICE), stats=stats, backend="triton")


def test_layers_of_two_row_strides_are_refused():
    layers = [torch.ones(2, 4, device=DEVICE), torch.ones(2, 8, device=DEVICE)[:, :4]]
    with pytest.raises(ValueError, match=r"hidden\[1\]: wanted row stride 4"):
        route(
            layers, torch.ones(2, 2, device=DEVICE), stats=tuple(torch.zeros(2, 2, 2, device=DEVICE)), backend="triton"
        )


def test_opcheck_and_compile():
    hidden = hidden_of("", 3, 4, 16, torch.float32).to(DEVICE)
    weights, cu_seqlens = weights_of("soft", (2, 1, 3)).to(DEVICE), bounds([3, 1]).to(DEVICE)
    mean, rstd = layer_stats(hidden, backend="triton")
    torch.library.opcheck(torch.ops.sr_kernels.layer_stats, ([hidden], "triton"))
    torch.library.opcheck(torch.ops.sr_kernels.route, ([hidden], weights, mean, rstd, cu_seqlens, True, "triton"))
    grad = torch.randn(1, 4, 16, device=DEVICE)
    torch.library.opcheck(torch.ops.sr_kernels.route_backward, (grad, [hidden], mean, rstd, cu_seqlens, "triton"))

    def loss(w):
        return route(hidden, w, cu_seqlens=cu_seqlens, backend="triton").square().sum()

    compiled, eager = weights.clone().requires_grad_(), weights.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    loss(eager).backward()
    assert torch.equal(compiled.grad, eager.grad)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA graphs")
def test_a_tuple_works_under_graph_capture():
    hidden = hidden_of("", 36, 6, 256, torch.bfloat16).to(DEVICE)
    layers, weights = tuple(hidden.unbind()), weights_of("soft", (24, 36)).to(DEVICE)
    expected = route(hidden, weights, backend="triton")
    route(layers, weights, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = route(layers, weights, backend="triton")
    out.fill_(float("nan"))
    launch.TABLES.clear()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA graphs")
def test_a_tuple_works_under_the_graphs_of_torch_compile():
    hidden = hidden_of("", 36, 6, 256, torch.bfloat16).to(DEVICE)
    layers, weights = tuple(hidden.unbind()), weights_of("soft", (24, 36)).to(DEVICE)
    compiled = torch.compile(lambda w: route(layers, w, backend="triton") * 2, mode="reduce-overhead")
    for _ in range(4):  # warmed up, recorded, replayed
        assert torch.equal(compiled(weights), route(hidden, weights, backend="triton") * 2)


@pytest.mark.parametrize("values", [[0, 3, 3, 3, 7], [0, 9, 4, 2**30, 7], [-5, 3, 3, 3, 5]])
def test_the_token_map_skips_empty_samples_and_stays_in_bounds(values):
    sample = torch.full((9,), -1, dtype=torch.int32, device=DEVICE)
    triton_kernels.token_map[(4,)](torch.tensor(values, dtype=torch.int32, device=DEVICE), sample, 7, BLOCK=4)
    assert sample[7:].tolist() == [-1, -1]
    assert sample[:7].min() >= 0
    if values[1] == 3:
        assert sample[:7].tolist() == [0, 0, 0, 3, 3, 3, 3]
