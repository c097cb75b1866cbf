"""The Hopper kernel against fp64: its own source run by an emulated cluster on the CPU, and on a GPU if there is one.

The emulator (`emulated_hopper.h`) runs every thread, draws their order and the time at which copies land, and
multiplies by the fragment layouts of the PTX ISA: indices, barriers, buffers in flight and rounding are the kernel's.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_routing import bounds, exact_norm, exact_route, relative
from test_routing_native import constant_row, equal_layers, far_mean, nearly_one_hot, one_hot, outliers

from sr_kernels import route
from sr_kernels.routing import build, hopper, hopper_codegen, op

COMPILER = shutil.which("g++")
emulated = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="the emulator needs g++ on Linux")
HERE = Path(__file__).parent
NAN = float("nan")


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulator") / "emulated_hopper.so"
    command = [COMPILER, "-std=c++17", "-O2", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    includes = ["-I", str(build.SOURCES), "-I", str(HERE)]
    subprocess.run([*command, *includes, str(HERE / "emulated_hopper.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_route.restype = ctypes.c_char_p
    loaded.emulated_route.argtypes = [
        ctypes.POINTER(ctypes.c_void_p), ctypes.c_int64, *[ctypes.c_void_p] * 6, ctypes.c_int64, *[ctypes.c_int] * 7,
        ctypes.c_uint,
    ]  # fmt: skip
    loaded.emulated_stages.argtypes = [ctypes.c_int64, ctypes.c_int64]
    return loaded


def run(emulator, layers, weights, cu_seqlens=None, *, stats=None, stages=None, clusters=1, seed=1):
    """(out, sumsq, mean, rstd) of the emulated kernel. Outputs start as NaN between rows of sevens that must stay."""
    tokens, channels = layers[0].shape
    n_layers, blocks = len(layers), weights.shape[-2]
    framed = torch.full((blocks * tokens * channels + 32,), 7.0, dtype=torch.bfloat16)
    out = framed[16:-16].view(blocks, tokens, channels).fill_(NAN)
    mean, rstd = stats or (torch.full((n_layers, tokens), NAN), torch.full((n_layers, tokens), NAN))
    squares = torch.full((2, blocks, tokens), NAN)
    rows = (ctypes.c_void_p * n_layers)(*[x.data_ptr() for x in layers])
    weights = weights.contiguous()
    samples = weights.shape[0] if weights.ndim == 3 else 1
    pointers = [None if x is None else x.data_ptr() for x in (weights, cu_seqlens, mean, rstd, out, squares)]
    stages = stages or emulator.emulated_stages(n_layers, channels)
    error = emulator.emulated_route(
        rows, layers[0].stride(0), *pointers, tokens, n_layers, blocks, channels, samples, stages, stats is not None,
        clusters, seed,
    )  # fmt: skip
    assert error is None, error.decode()
    assert (framed[:16] == 7).all()
    assert (framed[-16:] == 7).all()
    return out, squares.sum(0), mean, rstd


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(weights):
    return torch.full_like(weights, 1 / weights.shape[-1])


def hold(result, hidden, weights, lengths, spread=None):
    """Hold (out, sumsq, mean, rstd) to fp64."""
    out, sumsq, mean, rstd = result
    exact = exact_route(hidden, weights, lengths)
    ideal = relative(exact.bfloat16(), exact)
    assert relative(out, exact) <= 1.1 * ideal
    # Two operands of 11 bits, squared: at most 2^-9, where one channel is all; where many are, their errors average.
    assert relative(sumsq, exact.square().sum(-1)) < (2**-9 if spread is outliers else 5e-4)
    assert relative(mean, hidden.double().mean(-1)) < 3e-7
    exact_rstd = (hidden.double().var(-1, unbiased=False) + 1e-5).rsqrt()
    assert relative(rstd, exact_rstd) < (3e-6 if spread is far_mean else 3e-7)
    if spread is outliers:  # the outlier must not hide the error of the rest
        kept = torch.arange(hidden.shape[-1]) != 5
        rest = exact[..., kept]
        assert relative(out[..., kept], rest) <= 1.1 * relative(rest.bfloat16(), rest)


SPREADS = [torch.Tensor.contiguous, outliers, far_mean, constant_row, equal_layers]
PEAKS = [lambda w: w.softmax(-1), nearly_one_hot, one_hot, uniform]


@emulated
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("peak", PEAKS)
def test_error_is_the_rounding_of_the_output(emulator, spread, peak):
    lengths = [1, 2]
    hidden = spread(normal(36, 3, 256)).bfloat16()
    weights = peak(normal(2, 24, 36, seed=1))
    hold(run(emulator, list(hidden), weights, bounds(lengths)), hidden, weights, lengths, spread)


@emulated
@pytest.mark.parametrize(
    ("n_layers", "channels", "blocks"), [(36, 2560, 24), (48, 2560, 24), (37, 2560, 1), (36, 4096, 24)]
)
def test_full_size(emulator, n_layers, channels, blocks):
    hidden = outliers(normal(n_layers, 3, channels) * 2 + 0.3).bfloat16()
    weights = normal(1, blocks, n_layers, seed=1).softmax(-1)
    hold(run(emulator, list(hidden), weights, bounds([3])), hidden, weights, [3], outliers)


@emulated
@settings(max_examples=12, deadline=None)
@given(
    n_layers=st.integers(1, 48),
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any),
    channels=st.sampled_from([128, 256, 1664]),
    blocks=st.integers(1, 24),
    stages=st.integers(1, 4),
    clusters=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_any_size_in_any_order(emulator, n_layers, lengths, channels, blocks, stages, clusters, seed):
    hidden = (normal(n_layers, sum(lengths), channels) * 3 + 0.5).bfloat16()
    weights = normal(len(lengths), blocks, n_layers, seed=1).softmax(-1)
    stages = min(stages, emulator.emulated_stages(n_layers, channels))
    result = run(emulator, list(hidden), weights, bounds(lengths), stages=stages, clusters=clusters, seed=seed)
    hold(result, hidden, weights, lengths)


@emulated
def test_layouts_orders_and_given_statistics_give_the_same_bits(emulator):
    """A token's bits depend on nothing but its values."""
    n_layers, tokens, channels = 11, 5, 256
    hidden = (normal(n_layers, tokens, channels) * 3 + 0.5).bfloat16()
    weights = normal(3, n_layers, seed=1).softmax(-1)
    first = run(emulator, list(hidden), weights)
    wide = torch.full((tokens, n_layers, channels + 24), NAN, dtype=torch.bfloat16)
    wide[..., 8:-16] = hidden.transpose(0, 1)
    strided = wide.transpose(0, 1)[..., 8:-16]
    for again in (
        run(emulator, list(strided), weights, seed=5, clusters=2, stages=1),
        run(emulator, list(hidden), weights, seed=0, clusters=3, stages=4),
        run(emulator, list(hidden), weights, stats=first[2:], seed=2),
        run(emulator, list(hidden), weights[None].expand(2, -1, -1), bounds([2, 3]), seed=3),
    ):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@emulated
def test_constant_rows_are_zero_and_huge_and_tiny_weights_are_kept(emulator):
    hidden = torch.full((3, 2, 128), 300.1).bfloat16()
    hidden[1] = normal(2, 128, seed=3).bfloat16()
    weights = torch.tensor([[0.0, 0.0, 1e5], [1e-9, 1e-9, 1e-9], [0.0, 3e38, 0.0], [0.0, 1e-39, 0.0], [0.0] * 3])
    out = run(emulator, list(hidden), weights)[0]
    assert not out[0].any()
    assert not out[4].any()
    exact = exact_route(hidden, weights)
    for d in (1, 3):
        assert relative(out[d], exact[d]) <= 1.1 * relative(exact[d].bfloat16(), exact[d])
    assert torch.equal(out[2].isinf(), exact[2].bfloat16().isinf())


@emulated
@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("layer", [1, 2])
def test_nan_and_infinity_stay_in_their_token(emulator, bad, layer):
    hidden = normal(3, 4, 128).bfloat16()
    hidden[layer, 2, 9] = bad
    out = run(emulator, list(hidden), torch.full((2, 3), 1 / 3))[0]
    assert out[:, 2].isnan().all()
    assert out[:, [0, 1, 3]].isfinite().all()


@emulated
@pytest.mark.parametrize("values", [[0, 9, 4, 2**30, 7], [-5, 3, 3, 3, 5], [7, 7, 7, 7, 7]])
def test_no_bounds_lead_past_the_weights(emulator, values):
    weights = torch.full((6, 2, 3), NAN)
    weights[:4] = normal(4, 2, 3)
    hidden = normal(3, 7, 128).bfloat16()
    out = run(emulator, list(hidden), weights[:4], torch.tensor(values, dtype=torch.int32))[0]
    assert out.isfinite().all()


@emulated
def test_what_fits_in_shared_memory_is_what_the_check_lets_pass(emulator):
    for n_layers in (1, 13, 36, 45, 48):
        for channels in range(128, 300_000, 128 if n_layers > 1 else 12800):
            layers = [torch.empty(n_layers, 1, channels, dtype=torch.bfloat16, device="meta")]
            if emulator.emulated_stages(n_layers, channels):
                hopper.check(layers, 24)
            else:
                with pytest.raises(ValueError, match=r"hidden: wanted at most .* channels"):
                    hopper.check(layers, 24)
                break
    assert emulator.emulated_stages(36, 2560) == 2


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("layers", "blocks", "message"),
    [
        ([meta(36, 2, 128, dtype=torch.float16)], 24, "hidden: wanted dtype bfloat16"),
        ([meta(49, 2, 128)], 24, "hidden: wanted at most 48 layers"),
        ([meta(36, 2, 128)], 25, "weights: wanted at most 24 blocks"),
        ([meta(36, 2, 192)], 24, "hidden: wanted a multiple of 128 channels"),
        ([meta(36, 2, 8192)], 24, "hidden: wanted at most 6272 channels of 36 layers"),
        ([meta(2, 128), meta(2, 256)[:, :128]], 24, r"hidden\[1\]: wanted row stride 128"),
        ([meta(2, 2, 130)[..., :128]], 24, "hidden: wanted strides of multiples of 8"),
    ],
)
def test_what_the_kernel_cannot_hold_is_named(layers, blocks, message):
    with pytest.raises(ValueError, match=message):
        hopper.check(layers, blocks)


def test_it_is_never_the_default_and_refuses_by_name(monkeypatch):
    monkeypatch.setattr(op, "TRITON_INSTALLED", True)
    monkeypatch.delenv(op.VARIABLE, raising=False)
    assert op._choose("cuda", None, torch.bfloat16) == "triton"
    monkeypatch.setattr(op, "TRITON_INSTALLED", False)
    assert op._choose("cuda", None, torch.bfloat16) == "reference"
    with pytest.raises(RuntimeError, match="'native' cannot run routing on cuda: it has no CUDA kernel for"):
        op._choose("cuda", "native", torch.float16)
    for reason in ("no CUDA device", "it is for Hopper (sm_90), not sm_80"):
        monkeypatch.setattr(hopper, "why_not", lambda reason=reason: reason)
        with pytest.raises(RuntimeError) as raised:
            op._choose("cuda", "native", torch.bfloat16)
        assert str(raised.value) == f"backend: 'native' cannot run routing on cuda: {reason}"


BUILD = """
import torch
from sr_kernels.routing import hopper
hopper.load()
for name in ("native_route", "native_route_fused", "native_route_backward", "native_layer_stats"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sr_kernels::{name}", "CUDA"), name
"""


@pytest.mark.slow
@pytest.mark.skipif(hopper_codegen.nvcc() is None or torch.version.cuda is None, reason="no nvcc, or a CPU torch")
def test_it_builds_and_loads_without_a_gpu(tmp_path):
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CUDA_HOME": home}
    for announced in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True, check=False,
            cwd=HERE.parents[1],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert ("building the Hopper routing kernel" in done.stderr) == announced


def gpu(test):
    reason = hopper.why_not() if torch.cuda.is_available() else "no CUDA device"
    return pytest.mark.gpu(pytest.mark.skipif(reason is not None, reason=f"no Hopper kernel: {reason}")(test))


@pytest.fixture
def poison():
    """What torch.empty gives starts as NaN, in C++ too, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(hidden, weights, lengths, *, as_tuple=False):
    placed, cu = hidden.cuda(), bounds(lengths).cuda()
    w = weights.cuda().requires_grad_()
    given = tuple(placed.unbind()) if as_tuple else placed
    out, sumsq = route(given, w, cu_seqlens=cu, return_sumsq=True, backend="native")
    op_stats = torch.ops.sr_kernels.native_route_fused(
        list(given) if as_tuple else [placed], w.detach(), cu if w.ndim == 3 else None, False
    )[2:]
    return (out.detach().cpu(), sumsq.detach().cpu(), *[x.cpu() for x in op_stats]), out, sumsq, w


@gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("blocks", [1, 3, 24])
@pytest.mark.parametrize("n_layers", [1, 36, 37])
@pytest.mark.parametrize("lengths", [[1], [70, 0, 131, 10]])
def test_values_and_gradient_on_the_gpu(as_tuple, blocks, n_layers, lengths):
    hidden = outliers(normal(n_layers, sum(lengths), 2560) * 2 + 0.3).bfloat16()
    shape = (len(lengths), blocks, n_layers) if len(lengths) > 1 else (blocks, n_layers)
    weights = normal(*shape, seed=1).softmax(-1)
    result, out, sumsq, w = on_gpu(hidden, weights, lengths, as_tuple=as_tuple)
    hold(result, hidden, weights, lengths, outliers)
    grad, grad_sumsq = normal(*out.shape, seed=2).bfloat16(), normal(*sumsq.shape, seed=3) * 1e-3
    torch.autograd.backward((out, sumsq), (grad.cuda(), grad_sumsq.cuda()))
    total = grad + (2 * grad_sumsq[..., None] * result[0].float()).bfloat16()
    parts = zip(total.double().split(lengths, 1), exact_norm(hidden).split(lengths, 1), strict=True)
    expected = torch.stack([torch.einsum("dtc,ltc->dl", g, x) for g, x in parts]).view(weights.shape)
    assert relative(w.grad.cpu(), expected) < 5e-5


@gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("peak", PEAKS)
def test_adversarial_values_on_the_gpu(spread, peak):
    lengths = [100, 201]
    hidden = spread(normal(36, 301, 2560)).bfloat16()
    weights = peak(normal(2, 24, 36, seed=1))
    hold(on_gpu(hidden, weights, lengths)[0], hidden, weights, lengths, spread)


@gpu
def test_offsets_past_32_bits_on_the_gpu():
    tokens, blocks = 70_000, 24  # hidden 36 x 70,000 x 2560 = 6.4e9 elements, out 4.3e9
    hidden = torch.randn(36, tokens, 2560, device="cuda", dtype=torch.bfloat16)
    weights = normal(blocks, 36, seed=1).softmax(-1)
    out = route(hidden, weights.cuda(), backend="native")
    for part in (slice(0, 3), slice(23_300, 23_303), slice(tokens - 3, tokens)):
        exact = exact_route(hidden[:, part].cpu(), weights)
        assert relative(out[:, part].cpu(), exact) <= 1.1 * relative(exact.bfloat16(), exact)


@gpu
@pytest.mark.parametrize("n_layers", [1, 30, 36, 44, 48])
def test_the_gpu_gives_the_same_bits_twice_and_under_graph_capture(n_layers):
    layers = tuple((normal(n_layers, 1000, 2560) * 2 + 0.3).bfloat16().cuda().unbind())
    weights = normal(24, n_layers, seed=1).softmax(-1).cuda()
    first = route(layers, weights, return_sumsq=True, backend="native")
    again = route(torch.stack(layers), weights, return_sumsq=True, backend="native")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, sumsq = route(layers, weights, return_sumsq=True, backend="native")
    out.fill_(NAN)
    sumsq.fill_(NAN)
    graph.replay()
    for other in (again, (out, sumsq)):
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


@gpu
def test_opcheck_compile_and_misaligned_rows_on_the_gpu():
    hidden, cu = normal(5, 6, 128).bfloat16().cuda(), bounds([4, 2]).cuda()
    weights = normal(2, 3, 5, seed=1).softmax(-1).cuda()
    ops = torch.ops.sr_kernels
    mean, rstd = ops.native_layer_stats([hidden])
    torch.library.opcheck(ops.native_route.default, ([hidden], weights, mean, rstd, cu, True))
    torch.library.opcheck(ops.native_route_fused.default, (list(hidden.unbind()), weights, cu, True))
    torch.library.opcheck(ops.native_route_fused.default, ([hidden], weights[0], None, False))

    def loss(w):
        return route(hidden, w, cu_seqlens=cu, backend="native").float().square().sum()

    compiled, eager = weights.clone().requires_grad_(), weights.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    loss(eager).backward()
    assert torch.equal(compiled.grad, eager.grad)
    shifted = torch.zeros(5 * 6 * 128 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(5, 6, 128)
    with pytest.raises(ValueError, match=r"hidden: wanted an address at a multiple of 16 .* got 2 past one"):
        route(shifted, weights[0], backend="native")
