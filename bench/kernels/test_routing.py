"""Routing against plain torch: forward with statistics, gradient of the weights, statistics alone.

Contenders: every backend of ours that runs here; `eager` (the reference) and `compile` (torch.compile of it);
`layernorm`, a fused LayerNorm in the features' own dtype and one product (Liger's on a GPU if installed). For the
gradient, `layernorm` starts from the same inputs as ours and `saved` from a norm that its forward kept in memory.
"""

import importlib.util
import itertools

import pytest
import torch
import torch.nn.functional as F

from bench import model
from bench.kernels.harness import CUDA, DEVICE, TOKENS, measure, peak_over, rotations
from sr_kernels import layer_stats, route
from sr_kernels.routing import hopper, reference

LAYERS, CHANNELS = 36, 2560
SHAPES = [(LAYERS, d, t, CHANNELS, 1, torch.bfloat16) for t in TOKENS for d in (24, 1)]
if CUDA:  # weights per sample, 128-token prompts
    SHAPES.append((LAYERS, 24, 8192, CHANNELS, 64, torch.bfloat16))
else:  # the embedded default's shape: 32 prompts of a small LLM, weights per sample
    SHAPES += [(30, 6, 400, 576, 32, dtype) for dtype in (torch.bfloat16, torch.float32)]
OURS = ["triton"] if CUDA else ["native"]
# the Hopper kernel makes the forward pass alone: its gradient is Triton's
FORWARD = [*OURS, "native"] if CUDA and hopper.why_not() is None else OURS
PLAIN = ["eager", "compile", "layernorm"]
shapes = pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: f"L{s[0]}-D{s[1]}-T{s[2]}-C{s[3]}-B{s[4]}-{str(s[5])[6:]}"
)


def inputs(shape):
    """Rotating hidden states, weights, cu_seqlens (None for one sample) and the shape's model."""
    n_layers, blocks, tokens, channels, batch, dtype = shape
    costs = model.Routing(n_layers, blocks, tokens, channels, dtype.itemsize)
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = []
    for _ in range(rotations(costs.stats_bytes)):
        x = torch.randn(n_layers, tokens, channels, generator=g, device=DEVICE, dtype=dtype)
        x[..., 7] *= 1e3  # an outlier channel, as LLMs have
        hidden.append(x)
    logits = torch.randn(*((batch,) if batch > 1 else ()), blocks, n_layers, generator=g, device=DEVICE)
    lengths = torch.full((batch,), tokens // batch)
    lengths[: tokens % batch] += 1
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(DEVICE, torch.int32) if batch > 1 else None
    return hidden, logits.softmax(-1), cu_seqlens, costs


def layer_norm(x):
    if CUDA and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        ones = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype)
        return LigerLayerNormFunction.apply(x, ones, torch.zeros_like(ones), reference.LN_EPS)
    return F.layer_norm(x, x.shape[-1:])


def compiled(function):
    """Compiled for one shape alone: what earlier shapes left would count against the limit on recompiling."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def forward_of(name, weights, cu_seqlens):
    """hidden -> out of one contender."""
    if name in FORWARD:
        return lambda x: route(x, weights, cu_seqlens=cu_seqlens, backend=name)
    if name == "eager":
        return lambda x: reference.route(x, weights, cu_seqlens=cu_seqlens)
    if name == "compile":
        return compiled(lambda x: reference.route(x, weights, cu_seqlens=cu_seqlens))

    def run(x):
        w = weights.to(x.dtype)
        if cu_seqlens is None:
            return torch.einsum("dl,ltc->dtc", w, layer_norm(x))
        return torch.einsum("tdl,ltc->dtc", w[reference.sample_of_token(cu_seqlens, x.shape[1])], layer_norm(x))

    return run


def gradient_of(name, x, grad, cu_seqlens):
    """Prepare one contender, return the function that computes the gradient of the weights.

    No contender goes through autograd: a CUDA graph would have to capture the forward pass too. Ours and the reference
    start from statistics that the forward pass left.
    """
    if name in OURS:
        ops, stats = torch.ops.sr_kernels, layer_stats(x, backend=name)
        if name == "native":
            return lambda: ops.native_route_backward(grad, [x], *stats, cu_seqlens, None, None)
        return lambda: ops.route_backward(grad, [x], *stats, cu_seqlens, name)
    if name in ("eager", "compile"):
        stats = reference.layer_stats(x)
        run = lambda: reference.route_backward(grad, x, stats=stats, cu_seqlens=cu_seqlens)  # noqa: E731
        return compiled(run) if name == "compile" else run
    saved = layer_norm(x) if name == "saved" else None
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()

    def run():
        xhat = layer_norm(x) if saved is None else saved
        if bounds is None:
            return grad.flatten(1) @ xhat.flatten(1).T  # many times faster than the einsum
        pairs = itertools.pairwise(bounds)
        return torch.stack([grad[:, a:b].flatten(1) @ xhat[:, a:b].flatten(1).T for a, b in pairs])

    return run


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def exact(x, weights, cu_seqlens, grad=None):
    """fp64: (error that rounding the exact output gives, output), or the gradient, 256 tokens at a time."""
    total = 0
    owner = reference.sample_of_token(cu_seqlens, x.shape[1]) if cu_seqlens is not None else None
    for t in range(0, x.shape[1] if grad is not None else min(256, x.shape[1]), 256):
        part = slice(t, t + 256)
        xhat = reference.normalize(x[:, part].double(), None)
        if grad is None:
            w = weights.double() if owner is None else weights.double()[owner[part]]
            return torch.einsum("dl,ltc->dtc" if owner is None else "tdl,ltc->dtc", w, xhat)
        if owner is None:
            total = total + grad[:, part].double().flatten(1) @ xhat.flatten(1).T
        else:
            each = torch.einsum("dtc,ltc->tdl", grad[:, part].double(), xhat)
            total = total + torch.zeros_like(weights, dtype=torch.float64).index_add_(0, owner[part], each)
    return total


@shapes
@pytest.mark.parametrize("name", FORWARD + PLAIN)
def test_forward(benchmark, record, shape, name):
    hidden, weights, cu_seqlens, costs = inputs(shape)
    run = forward_of(name, weights, cu_seqlens)
    truth = exact(hidden[0], weights, cu_seqlens)
    error, ideal = relative(run(hidden[0])[:, :256], truth), relative(truth.to(hidden[0].dtype), truth)
    assert error <= (max(1.1 * ideal, 4e-7) if name in FORWARD else 0.05)  # no time without the right numbers
    peak = peak_over(lambda i: run(hidden[i]), lambda out: [out])
    figures = measure(benchmark, lambda i: run(hidden[i]), len(hidden), costs.forward_bytes, hidden[0])
    over = None if peak is None else 100 * peak / costs.forward_bytes
    benchmark.extra_info.update(error=error, ideal_error=ideal, peak_percent=over)
    record(
        op="forward",
        contender=name,
        flops_per_byte=costs.flops / costs.forward_bytes,
        error=error,
        ideal_error=ideal,
        peak_percent=over,
        **figures,
    )


@shapes
@pytest.mark.parametrize("name", [*OURS, *PLAIN, "saved"])
def test_backward(benchmark, record, shape, name):
    hidden, weights, cu_seqlens, costs = inputs(shape)
    grads = [torch.randn(shape[1], *x.shape[1:], device=DEVICE).to(x.dtype) for x in hidden]
    runs = [gradient_of(name, x, g, cu_seqlens) for x, g in zip(hidden, grads, strict=True)]
    error = relative(runs[0](), exact(hidden[0], weights, cu_seqlens, grads[0]))
    assert error <= (5e-5 if name in OURS else 0.05)
    peak = peak_over(lambda i: runs[i](), lambda out: [out])
    figures = measure(benchmark, lambda i: runs[i](), len(hidden), costs.backward_bytes, hidden[0])
    over = None if peak is None else 100 * peak / costs.backward_bytes
    benchmark.extra_info.update(error=error, peak_percent=over)
    record(
        op="backward",
        contender=name,
        flops_per_byte=costs.flops / costs.backward_bytes,
        error=error,
        peak_percent=over,
        **figures,
    )


@shapes
@pytest.mark.parametrize("name", [*OURS, "eager", "compile"])
def test_layer_stats(benchmark, record, shape, name):
    if shape[1] == 1:
        pytest.skip("the statistics do not depend on the blocks")
    hidden, _, _, costs = inputs(shape)
    if name in OURS:
        run = lambda x: layer_stats(x, backend=name)  # noqa: E731
    else:
        run = compiled(reference.layer_stats) if name == "compile" else reference.layer_stats
    mean, rstd = reference.layer_stats(hidden[0][:, :256].double())
    got = run(hidden[0])
    error = max(relative(got[0][:, :256], mean), relative(got[1][:, :256], rstd))
    assert error <= 1e-5
    figures = measure(benchmark, lambda i: run(hidden[i]), len(hidden), costs.stats_bytes, hidden[0])
    benchmark.extra_info.update(error=error)
    record(op="layer_stats", contender=name, error=error, **figures)
