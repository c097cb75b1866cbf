"""The C++ CPU kernel against fp64: adversarial inputs, odd sizes, layouts, bits, and every element written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from sr_kernels import layer_stats, route
from sr_kernels.routing import native, op, reference

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no native kernel: {native.why_not()}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_norm(hidden):
    x = hidden.double()
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def per_token(weights, lengths):
    """[(B,) D, L] -> [T, D, L] in fp64."""
    if weights.ndim == 2:
        return weights.double().expand(sum(lengths), -1, -1)
    return weights.double().repeat_interleave(torch.tensor(lengths), 0)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def bounds(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def outliers(x):
    x[..., 5] *= 1e4
    return x


def far_mean(x):
    return x + 300


def constant_row(x):
    x[:, 1] = 7.3
    return x


def equal_layers(x):
    return x[:1].expand_as(x).contiguous()


def one_hot(weights):
    return torch.nn.functional.one_hot(weights.argmax(-1), weights.shape[-1]).float()


def nearly_one_hot(weights):
    return (weights * 60).softmax(-1)


# A result in fp32 also carries the roundings of its sums. With a mean of 300 deviations it carries that of the mean,
# half a unit of 300 in the last place, which the statistics' dtype sets.
FP32 = 4e-7
FP32_FAR = 3e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [torch.Tensor.contiguous, outliers, far_mean, constant_row, equal_layers])
@pytest.mark.parametrize("peak", [lambda w: w.softmax(-1), nearly_one_hot, one_hot])
def test_error_is_the_rounding_of_the_output(dtype, spread, peak):
    lengths = [3, 5]
    hidden = spread(normal(36, 8, 320)).to(dtype)
    weights = peak(normal(2, 24, 36, seed=1))
    out, sumsq = route(hidden, weights, cu_seqlens=bounds(lengths), return_sumsq=True, backend="native")
    exact = torch.einsum("tdl,ltc->dtc", per_token(weights, lengths), exact_norm(hidden))
    if dtype == torch.float32:
        limit = FP32_FAR if spread is far_mean else FP32
    else:
        limit = relative(exact.to(dtype), exact) * (3 if spread is far_mean else 1.1)
    assert relative(out, exact) <= limit
    assert relative(sumsq, exact.square().sum(-1)) <= (FP32_FAR if spread is far_mean else FP32) * 2
    if spread is outliers:  # the outlier must not hide the error of the rest
        kept = torch.arange(320) != 5
        rest, rest_exact = out[..., kept], exact[..., kept]
        floor = FP32 if dtype == torch.float32 else 1.1 * relative(rest_exact.to(dtype), rest_exact)
        assert relative(rest, rest_exact) <= floor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [torch.Tensor.contiguous, outliers, far_mean, constant_row, equal_layers])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradient(dtype, spread, offset):
    lengths = [20, 0, 18]
    hidden = spread(normal(7, 38, 320)).to(dtype)
    weights = normal(3, 5, 7, seed=1).softmax(-1).requires_grad_()
    out, sumsq = route(hidden, weights, cu_seqlens=bounds(lengths), return_sumsq=True, backend="native")
    if spread is far_mean:  # sum_c grad meets the fp32 rounding of the mean, 9e-6 deviations: no kernel can undo it
        offset = 0.0
    grad, grad_sumsq = (normal(5, 38, 320, seed=2) + offset).to(dtype), normal(5, 38, seed=3)
    xhat = exact_norm(hidden)
    samples = torch.arange(3).repeat_interleave(torch.tensor(lengths))

    def oracle(g):
        return xhat.new_zeros(3, 5, 7).index_add_(0, samples, torch.einsum("dtc,ltc->tdl", g, xhat))

    plain, squared = torch.autograd.grad((out,), weights, grad, retain_graph=True)[0], oracle(grad.double())
    assert relative(plain, squared) < 5e-5
    both = torch.autograd.grad((out, sumsq), weights, (grad, grad_sumsq))[0]
    assert relative(both, oracle(grad.double() + 2 * grad_sumsq.double()[..., None] * out.detach().double())) < 5e-5
    assert torch.equal(both[1], torch.zeros(5, 7))


SIZES = [  # L, lengths, C, D: nothing a multiple of any tile; ones; an empty sample
    (1, [1], 1, 1),
    (37, [1], 33, 1),
    (37, [5, 0, 12], 131, 25),
    (2, [17], 515, 13),
    (3, [33, 1], 127, 2),
    (9, [2, 3], 64, 7),
    (36, [4], 1025, 24),
    (5, [6], 31, 11),
]


@pytest.mark.parametrize(("n_layers", "lengths", "channels", "blocks"), SIZES)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_and_layouts(n_layers, lengths, channels, blocks, per_sample, dtype):
    tokens = sum(lengths)
    hidden = (normal(n_layers, tokens, channels) * 3 + 0.5).to(dtype)
    shape = (len(lengths), blocks, n_layers) if per_sample else (blocks, n_layers)
    weights = normal(*shape, seed=1).softmax(-1).requires_grad_()
    keys = {"cu_seqlens": bounds(lengths), "return_sumsq": True, "backend": "native"}
    out, sumsq = route(hidden, weights, **keys)
    exact = torch.einsum("tdl,ltc->dtc", per_token(weights.detach(), lengths), exact_norm(hidden))
    ideal = 4e-7 if dtype == torch.float32 else 1.1 * relative(exact.to(dtype), exact)
    if channels > 1:  # one channel normalises to zero
        assert relative(out, exact) <= ideal
        assert relative(sumsq, exact.square().sum(-1)) < 1e-6
    else:
        assert torch.equal(out, torch.zeros_like(out))
    mean, rstd = layer_stats(hidden, backend="native")
    assert relative(mean, hidden.double().mean(-1)) < 1e-6
    assert relative(rstd, (hidden.double().var(-1, unbiased=False) + 1e-5).rsqrt()) < 1e-6
    grad = normal(blocks, tokens, channels, seed=2).to(dtype)
    d_weights = torch.autograd.grad(out, weights, grad)[0]
    expected = reference.route_backward(
        grad.double(), hidden.double(), stats=(mean.double(), rstd.double()),
        cu_seqlens=bounds(lengths) if per_sample else None,
    )  # fmt: skip
    assert torch.allclose(d_weights.double(), expected, rtol=0, atol=5e-5 * max(expected.norm().item(), 1e-3))

    wide = torch.empty(tokens, n_layers, channels + 3, dtype=dtype)
    wide[..., :channels] = hidden.transpose(0, 1)
    strided = wide.transpose(0, 1)[..., :channels]  # the layer is the inner dimension, rows are not aligned
    every_other = torch.full((2 * len(lengths) + 2,), tokens, dtype=torch.int32)[::2]
    every_other.copy_(bounds(lengths))
    for same, cu in ((tuple(hidden), bounds(lengths)), (strided, every_other), (list(strided), every_other)):
        for given in ({"stats": (mean, rstd)}, {}):
            again, squares = route(same, weights, **keys | given | {"cu_seqlens": cu})
            assert torch.equal(again, out)
            assert torch.equal(squares, sumsq)
            assert torch.equal(torch.autograd.grad(again, weights, grad)[0], d_weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice_and_on_any_number_of_threads(dtype):
    hidden = normal(11, 75, 200).to(dtype)
    weights = normal(2, 7, 11, seed=1).requires_grad_()
    grad = normal(7, 75, 200, seed=2).to(dtype)

    def run():
        out, sumsq = route(hidden, weights, cu_seqlens=bounds([52, 23]), return_sumsq=True, backend="native")
        return [out, sumsq, *layer_stats(hidden, backend="native"), torch.autograd.grad(out, weights, grad)[0]]

    threads = torch.get_num_threads()
    try:
        results = [run(), run()]
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_is_written(dtype):
    """`fill_uninitialized_memory` poisons what torch.empty gives with NaN, in C++ too."""
    hidden, weights = normal(5, 19, 77).to(dtype), normal(3, 9, 5).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(5).isnan().all()
        out, sumsq = route(hidden, weights, cu_seqlens=bounds([10, 0, 9]), return_sumsq=True, backend="native")
        gradient = torch.autograd.grad((out, sumsq), weights, (out.detach(), sumsq.detach()))[0]
        stats = layer_stats(hidden, backend="native")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in (out, sumsq, gradient, *stats))


def test_nan_and_infinity_stay_in_their_token():
    for bad in (float("nan"), float("inf")):
        for dtype in DTYPES:
            hidden = normal(3, 4, 70).to(dtype)
            hidden[1, 2, 9] = bad
            out = route(hidden, torch.full((2, 3), 1 / 3), backend="native")
            assert out[:, 2].isnan().all()
            assert out[:, [0, 1, 3]].isfinite().all()


def test_gradient_of_an_expanded_grad():
    hidden, weights = normal(4, 6, 48), normal(3, 4).requires_grad_()
    route(hidden, weights, backend="native").sum().backward()  # every stride of the grad is 0
    assert weights.grad.abs().max() < 1e-3  # LN sums to zero over its channels
    assert relative(route(hidden, weights, backend="native"), route(hidden, weights, backend="reference")) < 1e-6


@pytest.mark.parametrize("as_list", [False, True])
def test_opcheck_and_compile(as_list):
    hidden = normal(3, 6, 16).bfloat16()
    layers = list(hidden) if as_list else [hidden]
    weights, cu = normal(2, 2, 3).softmax(-1), bounds([4, 2])
    mean, rstd = layer_stats(hidden, backend="native")
    ops, grad = torch.ops.sr_kernels, normal(2, 6, 16).bfloat16()
    out, sumsq = ops.native_route(layers, weights, mean, rstd, cu, True)
    torch.library.opcheck(ops.native_layer_stats.default, (layers,))
    torch.library.opcheck(ops.native_route.default, (layers, weights, mean, rstd, cu, True))
    torch.library.opcheck(ops.native_route.default, (layers, weights[0], mean, rstd, None, False))
    torch.library.opcheck(ops.native_route_fused.default, (layers, weights, cu, True))
    torch.library.opcheck(ops.native_route_backward.default, (grad, layers, mean, rstd, cu, out, sumsq))
    torch.library.opcheck(ops.native_route_backward.default, (grad, layers, mean, rstd, None, None, None))

    given = tuple(layers) if as_list else hidden

    def loss(w):
        out, sumsq = route(given, w, cu_seqlens=cu, return_sumsq=True, backend="native")
        return (out.float() * sumsq[..., None]).sum()

    compiled_w, eager_w = weights.clone().requires_grad_(), weights.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled_w).backward()
    loss(eager_w).backward()
    assert torch.equal(compiled_w.grad, eager_w.grad)


@pytest.mark.parametrize("values", [[0, 9, 6], [1, 3, 6], [0, 4, 5], [0, 5, 7], [0, 7, 6]])
def test_bounds_that_a_compiled_graph_does_not_read_are_refused(values):
    hidden, weights = normal(3, 6, 16), normal(2, 2, 3)
    mean, rstd = layer_stats(hidden, backend="native")
    ops, cu = torch.ops.sr_kernels, torch.tensor(values, dtype=torch.int32)
    compiled = torch.compile(lambda cu: route(hidden, weights, cu_seqlens=cu, backend="native"), backend="eager")
    assert torch.equal(compiled(bounds([2, 4])), route(hidden, weights, cu_seqlens=bounds([2, 4]), backend="native"))
    for call in (
        lambda: compiled(cu),
        lambda: ops.native_route([hidden], weights, mean, rstd, cu, False),
        lambda: ops.native_route_fused([hidden], weights, cu, True),
        lambda: ops.native_route_backward(normal(2, 6, 16), [hidden], mean, rstd, cu, None, None),
    ):
        with pytest.raises(ValueError, match=rf"cu_seqlens: wanted non-decreasing values from 0 to 6, got \{values}"):
            call()


def test_the_default_on_a_cpu():
    assert op.backend_for(torch.device("cpu"), dtype=torch.bfloat16) == "native"
    assert op.backend_for(torch.device("cpu"), dtype=torch.float64) == "reference"
    assert op.backend_for(torch.device("meta")) == "reference"
    with pytest.raises(RuntimeError, match="'native' cannot run routing on cpu: it has no kernel for"):
        route(normal(2, 3, 4).double(), torch.ones(1, 2).double(), backend="native")
    hidden, weights = normal(3, 4, 16), normal(2, 3)
    assert torch.equal(route(hidden, weights), route(hidden, weights, backend="native"))


NO_COMPILER = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from sr_kernels import route
    hidden, weights = torch.randn(3, 4, 16), torch.rand(2, 3)
    for _ in range(2):
        assert torch.equal(route(hidden, weights), route(hidden, weights, backend="reference"))
    route(hidden.bfloat16(), weights)
messages = [str(w.message) for w in caught if "native" in str(w.message)]
assert len(messages) == 1 and "no C++ compiler" in messages[0], messages
"""

BUILT_ONCE = """
from sr_kernels.routing import native
assert native.why_not() is None, native.why_not()
"""


def test_without_a_compiler_one_warning_and_the_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", NO_COMPILER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_build_finds_the_programs_beside_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    paths = []

    def failing_load(*args, **kwargs):
        paths.append(os.environ["PATH"])
        raise RuntimeError

    monkeypatch.setattr(cpp_extension, "load", failing_load)
    assert native.why_not.__wrapped__() == f"no C++ compiler ({cpp_extension.get_cxx_compiler()!r} is not on the path)"
    monkeypatch.setattr(native, "_check_compiler", lambda: None)
    assert native.why_not.__wrapped__() == "RuntimeError()"  # an error without a text has a name
    assert paths == [f"{Path(sys.executable).parent}{os.pathsep}/nowhere"]
    assert os.environ["PATH"] == "/nowhere"


@pytest.mark.slow
def test_ranks_that_start_together_build_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    command = [sys.executable, "-c", BUILT_ONCE]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(3)]
    output = "".join(rank.communicate()[0] for rank in ranks)
    assert all(rank.returncode == 0 for rank in ranks), output
    assert output.splitlines() == ["sr_kernels: building the CPU routing kernel, once (half a minute)"]
