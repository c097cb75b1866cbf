"""varlen_attention's backends against fp64, forward and backward, on ragged grouped-query batches."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sr_kernels import varlen_attention
from sr_kernels.attention import dense_attention, op, reference


def bounds(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def run(fn, q, k, v, grad):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = fn(*leaves)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def compare(lengths_q, lengths_k, heads, kv_heads, head_dim, causal, tolerance=2e-6):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(sum(lengths_q), heads, head_dim, generator=g)
    k, v = (torch.randn(sum(lengths_k), kv_heads, head_dim, generator=g) for _ in range(2))
    grad = torch.randn(q.shape, generator=g)
    cu_q, cu_k = bounds(lengths_q), bounds(lengths_k)
    wide = [x.double() for x in (q, k, v, grad)]
    exact = run(lambda *a: reference.varlen_attention(*a, cu_q, cu_k, causal=causal), *wide)
    for backend in ("sdpa", "reference"):
        got = run(
            lambda *a, b=backend: varlen_attention(
                *a, cu_q, cu_k, max(lengths_q), max(lengths_k), causal=causal, backend=b
            ),
            q, k, v, grad,
        )  # fmt: skip
        for x, y in zip(got, exact, strict=True):
            assert torch.isfinite(x).all()
            assert (x - y).norm() <= tolerance * max(y.norm(), grad.norm())  # a gradient may cancel to 0


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8)), min_size=1, max_size=4),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([8, 16, 24]),
    causal=st.booleans(),
)
def test_ragged_batches_match_fp64(lengths, groups, kv_heads, head_dim, causal):
    lengths_q = [n for n, _ in lengths]
    compare(lengths_q, [n + more for n, more in lengths], groups * kv_heads, kv_heads, head_dim, causal)


@pytest.mark.parametrize(("queries", "keys"), [(64, [1, 512, 37]), (256, [1, 512, 37]), (1024, [77, 1])])
def test_the_models_geometry(queries, keys):
    compare([queries] * len(keys), keys, 32, 8, 128, False)


def test_the_packed_llms_geometry():
    compare([130, 1, 57], [130, 1, 57], 32, 8, 128, True)


@pytest.mark.parametrize("masked", [False, True])
def test_the_plain_products_of_half_precision_training_stay_near_the_kernels_error(masked):
    g = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(4, 4, 24, 32, generator=g).bfloat16() for _ in range(2))
    k, v = (torch.randn(4, 2, 17, 32, generator=g).bfloat16() for _ in range(2))
    mask = torch.rand(4, 1, 1, 17, generator=g) > 0.3 if masked else None

    def errors(attend):
        exact = run(lambda *a: F.scaled_dot_product_attention(*a, attn_mask=mask, enable_gqa=True),
                    *(x.double() for x in (q, k, v, grad)))  # fmt: skip
        got = run(attend, q, k, v, grad)
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]

    kernel = errors(lambda *a: F.scaled_dot_product_attention(*a, attn_mask=mask, enable_gqa=True))
    plain = errors(lambda *a: dense_attention(*a, mask=mask))
    assert all(ours <= 1.3 * theirs for ours, theirs in zip(plain, kernel, strict=True)), (plain, kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("lengths", [[(5, 2), (3, 4)], [(4, 2), (4, 2)], [(6, 1)]])
def test_causal_queries_before_the_first_key_give_0(backend, lengths, dtype):
    g = torch.Generator().manual_seed(0)
    queries, keys = ([n[i] for n in lengths] for i in range(2))
    q, grad = (torch.randn(sum(queries), 4, 8, generator=g).to(dtype) for _ in range(2))
    k, v = (torch.randn(sum(keys), 2, 8, generator=g).to(dtype) for _ in range(2))
    got = run(
        lambda *a: varlen_attention(
            *a, bounds(queries), bounds(keys), max(queries), max(keys), causal=True, backend=backend
        ),
        q, k, v, grad,
    )  # fmt: skip

    def query_by_query(q, k, v):
        rows, q0, k0 = [], 0, 0
        for nq, nk in lengths:
            for i in range(nq):
                n = max(0, i + 1 + nk - nq)  # keys that query i sees
                seen_k, seen_v = (x[k0 : k0 + n].repeat_interleave(2, 1) for x in (k, v))
                weights = torch.einsum("hd,nhd->hn", q[q0 + i], seen_k / 8**0.5).softmax(-1)
                rows.append(torch.einsum("hn,nhd->hd", weights, seen_v))
            q0, k0 = q0 + nq, k0 + nk
        return torch.stack(rows)

    exact = run(query_by_query, *(x.double() for x in (q, k, v, grad)))
    for x, y in zip(got, exact, strict=True):
        assert (x - y).norm() <= (2e-6 if dtype == torch.float32 else 1e-2) * grad.norm()
    blind = torch.cat([torch.arange(nq) < nq - nk for nq, nk in lengths])
    assert not got[0][blind].any()
    assert not got[1][blind].any()


def test_the_reference_is_the_same_under_autocast():
    q, k, v = (torch.randn(6, 2, 8) for _ in range(3))
    cu = bounds([2, 4])
    expected = reference.varlen_attention(q, k, v, cu, cu)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference.varlen_attention(q, k, v, cu, cu), expected)


def test_a_flash_attention_that_does_not_load_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: x')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(op, "_flash", op._flash.__wrapped__)
    reasons = op.usable.__wrapped__("cuda", torch.bfloat16)
    assert reasons == {
        "flash": "flash-attn is installed but does not load: undefined symbol: x",
        "torch": None, "sdpa": None, "reference": None,
    }  # fmt: skip


def test_one_sequence_does_not_see_another():
    q, k, v = (torch.randn(6, 2, 8) for _ in range(3))
    cu = bounds([2, 4])
    before = varlen_attention(q, k, v, cu, cu, 4, 4)
    k[2:], v[2:] = 1e6, float("nan")
    assert torch.equal(varlen_attention(q, k, v, cu, cu, 4, 4)[:2], before[:2])


Q, KV = torch.randn(6, 4, 8), torch.randn(5, 2, 8)
GOOD = {
    "q": Q,
    "k": KV,
    "v": KV,
    "cu_seqlens_q": bounds([2, 4]),
    "cu_seqlens_k": bounds([3, 2]),
    "max_q": 4,
    "max_k": 3,
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens_k": bounds([5, 0])}, "cu_seqlens_k: wanted at least 1 in every sequence, got 0 in sequence 1"),
        ({"cu_seqlens_k": bounds([3, 3])}, "cu_seqlens_k: wanted to run from 0 to 5"),
        ({"cu_seqlens_k": bounds([5])}, "cu_seqlens_k: wanted 3 entries"),
        ({"max_k": 2}, "max_k: wanted at least 3"),
        ({"v": KV[:4]}, "v: wanted k's shape"),
        ({"k": KV.double()}, "k and v: wanted q's dtype"),
        ({"q": Q[:, :3]}, "a divisor of 3 heads"),
        ({"backend": "flash"}, "'flash' cannot run attention on cpu"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        varlen_attention(**{**GOOD, **arguments})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [([256] * 4, [1, 512, 300, 37], False), ([1024] * 2, [512, 129], False), ([512, 1, 200], [512, 1, 200], True)],
)
@pytest.mark.parametrize("backend", ["flash", "torch", "sdpa"])
def test_gpu_backends_match_fp64(backend, queries, keys, causal):
    reason = op.usable("cuda", torch.bfloat16)[backend]
    if reason:
        pytest.skip(reason)
    g = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(sum(queries), 32, 128, generator=g).bfloat16() for _ in range(2))
    k, v = (torch.randn(sum(keys), 8, 128, generator=g).bfloat16() for _ in range(2))
    cu_q, cu_k = bounds(queries), bounds(keys)
    exact = run(
        lambda *a: reference.varlen_attention(*a, cu_q, cu_k, causal=causal), *(x.double() for x in (q, k, v, grad))
    )
    got = run(
        lambda *a: varlen_attention(
            *a, cu_q.cuda(), cu_k.cuda(), max(queries), max(keys), causal=causal, backend=backend
        ),
        *(x.cuda() for x in (q, k, v, grad)),
    )
    for x, y in zip(got, exact, strict=True):
        assert (x.cpu().double() - y).norm() <= 8e-3 * y.norm()
