"""The routing op against an fp64 sum written out here, and its refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sr_kernels import layer_stats, route
from sr_kernels.routing import op, reference


def exact_norm(hidden):
    x = hidden.double()
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def exact_route(hidden, weights, lengths=None):
    xhat = exact_norm(hidden)
    if weights.ndim == 2:
        return torch.stack([sum(w[i].double() * xhat[i] for i in range(len(xhat))) for w in weights])
    start, parts = 0, []
    for sample, n in zip(weights, lengths, strict=True):
        parts.append(exact_route(hidden[:, start : start + n], sample))
        start += n
    return torch.cat(parts, 1)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def bounds(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def case(n_layers, lengths, channels, blocks, per_sample, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_layers, sum(lengths), channels, generator=g) * 3 + 0.5
    hidden[..., 0] *= 1e3  # an outlier channel, as LLMs have
    logits = torch.randn(*((len(lengths),) if per_sample else ()), blocks, n_layers, generator=g)
    return hidden.to(dtype), logits.softmax(-1)


@settings(max_examples=25, deadline=None)
@given(
    n_layers=st.integers(1, 7),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    channels=st.integers(2, 37),
    blocks=st.integers(1, 4),
    per_sample=st.booleans(),
    as_tuple=st.booleans(),
)
def test_forward_and_gradient_match_fp64(n_layers, lengths, channels, blocks, per_sample, as_tuple):
    hidden, weights = case(n_layers, lengths, channels, blocks, per_sample)
    weights.requires_grad_()
    given_hidden = tuple(hidden) if as_tuple else hidden
    out, sumsq = route(given_hidden, weights, cu_seqlens=bounds(lengths), return_sumsq=True)
    oracle_weights = weights.detach().double().requires_grad_()
    oracle = exact_route(hidden, oracle_weights, lengths)
    assert relative(out, oracle) < 2e-6
    assert relative(sumsq, oracle.square().sum(-1)) < 2e-6
    g = torch.randn(oracle.shape, generator=torch.Generator().manual_seed(1))
    gs = torch.randn(sumsq.shape, generator=torch.Generator().manual_seed(2))
    torch.autograd.backward((out, sumsq), (g, gs))
    torch.autograd.backward((oracle, oracle.square().sum(-1)), (g.double(), gs.double()))
    assert relative(weights.grad, oracle_weights.grad) < 5e-5


def test_bf16_error_is_the_rounding_of_the_output():
    hidden, weights = case(36, [40, 1, 23], 256, 5, True, torch.bfloat16)
    exact = exact_route(hidden, weights, [40, 1, 23])
    ideal = relative(exact.to(torch.bfloat16), exact)
    assert relative(route(hidden, weights, cu_seqlens=bounds([40, 1, 23])), exact) <= 1.1 * ideal


def test_stats_given_equal_stats_taken():
    hidden, weights = case(4, [5, 3], 24, 3, False)
    assert torch.equal(route(hidden, weights), route(hidden, weights, stats=layer_stats(hidden)))
    mean, rstd = layer_stats(hidden)
    assert relative(mean, hidden.double().mean(-1)) < 1e-6
    assert relative(rstd, (hidden.double().var(-1, unbiased=False) + 1e-5).rsqrt()) < 1e-6


def test_a_constant_row_normalises_to_zero():
    out = route(torch.full((2, 3, 8), 300.0), torch.tensor([[0.5, 0.5]]))
    assert torch.equal(out, torch.zeros(1, 3, 8))


def test_opcheck_and_compile():
    hidden, weights = case(3, [4, 2], 16, 2, True)
    mean, rstd = layer_stats(hidden)
    cu = bounds([4, 2])
    torch.library.opcheck(torch.ops.sr_kernels.layer_stats, ([hidden], "reference"))
    torch.library.opcheck(torch.ops.sr_kernels.route, ([hidden], weights, mean, rstd, cu, True, "reference"))
    grad = torch.randn(2, 6, 16)
    torch.library.opcheck(torch.ops.sr_kernels.route_backward, (grad, [hidden], mean, rstd, cu, "reference"))

    def loss(w):
        return route(hidden, w, cu_seqlens=cu, stats=(mean, rstd)).square().sum()

    compiled_w, eager_w = weights.clone().requires_grad_(), weights.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled_w).backward()
    loss(eager_w).backward()
    assert torch.equal(compiled_w.grad, eager_w.grad)


def test_meta_shapes():
    hidden = torch.empty(3, 5, 8, dtype=torch.bfloat16, device="meta")
    out, sumsq = route(hidden, torch.empty(4, 3, device="meta"), return_sumsq=True)
    assert out.shape == (4, 5, 8)
    assert out.dtype == torch.bfloat16
    assert sumsq.shape == (4, 5)
    assert sumsq.dtype == torch.float32


H, W = torch.randn(3, 6, 8), torch.full((2, 3), 1 / 3)
WB = W.expand(2, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": H.long()}, "hidden: wanted dtype"),
        ({"hidden": H[0]}, "hidden: wanted 3 dimensions"),
        ({"hidden": H.transpose(1, 2)}, "stride 1"),
        ({"hidden": [H[0], H[1, :4], H[2]]}, r"hidden\[1\]: wanted shape \[6, 8\]"),
        ({"hidden": [H[0], None, H[2]]}, r"hidden\[1\]: wanted a tensor, got NoneType"),
        ({"hidden": []}, "at least one layer"),
        ({"hidden": H[:, :0]}, "no empty dimension"),
        ({"hidden": H.clone().requires_grad_()}, "frozen"),
        ({"weights": W[:, :2]}, "weights: wanted 3 layers"),
        ({"weights": W.half()}, "weights: wanted dtype"),
        ({"weights": W[0]}, r"weights: wanted \[D, L\] or \[B, D, L\]"),
        ({"weights": W.to("meta")}, "weights: wanted device cpu"),
        ({"weights": WB}, r"cu_seqlens: wanted \[B\+1\]"),
        ({"weights": WB, "cu_seqlens": bounds([6])}, "cu_seqlens: wanted 3 entries"),
        ({"weights": WB, "cu_seqlens": bounds([2, 3])}, "cu_seqlens: wanted to run from 0 to 6"),
        ({"weights": WB, "cu_seqlens": torch.tensor([0, 7, 6], dtype=torch.int32)}, "non-decreasing"),
        ({"weights": WB, "cu_seqlens": torch.tensor([0, 3, 6])}, "cu_seqlens: wanted dtype int32"),
        ({"stats": (torch.zeros(3, 5), torch.zeros(3, 5))}, r"mean\): wanted shape \[3, 6\]"),
        ({"stats": (torch.zeros(3, 6),)}, r"stats: wanted \(mean, rstd\), got 1 values"),
        ({"stats": [torch.zeros(3, 6)] * 3}, r"stats: wanted \(mean, rstd\), got 3 values"),
        ({"stats": torch.zeros(2, 3, 6)}, r"stats: wanted \(mean, rstd\), got Tensor"),
        ({"stats": (torch.zeros(3, 6), None)}, r"stats\[1\] \(rstd\): wanted a tensor, got NoneType"),
        ({"backend": "cuda"}, "backend: wanted one of"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        route(**{"hidden": H, "weights": W, **arguments})


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_reference_is_the_same_under_autocast(per_sample):
    hidden, weights = case(5, [3, 4], 16, 2, per_sample)
    cu = bounds([3, 4]) if per_sample else None
    grad = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(3))

    def run():
        w = weights.clone().requires_grad_()
        out = route(hidden, w, cu_seqlens=cu, backend="reference")
        direct = reference.route(hidden, weights, cu_seqlens=cu)
        return out, direct, torch.autograd.grad(out, w, grad)[0]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_without_a_c_compiler_a_gpu_falls_back_with_one_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("SR_KERNELS_BACKEND", raising=False)
    op._warn_of_the_reference.cache_clear()
    with pytest.warns(UserWarning, match="no Triton") as caught:
        assert [op._choose("cuda", None, dtype) for dtype in (torch.bfloat16, torch.float32)] == ["reference"] * 2
    assert [str(w.message) for w in caught] == [
        "no Triton routing kernel, the slower reference runs: no C compiler, which Triton builds its launcher with "
        "(gcc or clang is not on the path)"
    ]
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(
        RuntimeError, match=r"'triton' cannot run .*no C compiler.*\(no-such-compiler is not on the path"
    ):
        op._choose("cuda", "triton", torch.bfloat16)
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.delenv("CC")
    assert op._choose("cuda", None, torch.bfloat16) == "triton"


def test_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setattr(op, "_CHOSEN", {})
    monkeypatch.setenv("SR_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"SR_KERNELS_BACKEND: wanted one of .*, got 'nonsense'"):
        route(H, W)
    assert torch.equal(route(H, W, backend="reference"), reference.route(H, W))
