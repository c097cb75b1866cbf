"""Packed attention, forward: every backend that runs here; ragged keys, grouped queries 32:8, head dim 128."""

import pytest
import torch

from bench import model
from bench.kernels.harness import CUDA, DEVICE, measure, peak_over, rotations
from sr_kernels import varlen_attention
from sr_kernels.attention import op, reference

DTYPE = torch.bfloat16
USABLE = [name for name, reason in op.usable(DEVICE.type, DTYPE).items() if reason is None]
# the reference reads the bounds' values, which no CUDA graph captures
BACKENDS = [name for name in USABLE if not (CUDA and name == "reference")]
BATCH, QUERIES = (32, 1024) if CUDA else (2, 128)


@pytest.mark.parametrize("name", BACKENDS)
def test_cross_attention(benchmark, record, name):
    g = torch.Generator().manual_seed(0)
    keys = torch.randint(1, 513, (BATCH,), generator=g)
    cu_q = torch.arange(BATCH + 1, dtype=torch.int32) * QUERIES
    cu_k = torch.nn.functional.pad(keys.cumsum(0), (1, 0)).int()
    total_q, total_k, longest = BATCH * QUERIES, int(keys.sum()), int(keys.max())
    costs = model.Attention(tuple((QUERIES, int(k)) for k in keys), 32, 8, 128, DTYPE.itemsize)

    def tensors(seed):
        g = torch.Generator().manual_seed(seed)
        return [
            torch.randn(n, h, 128, generator=g).to(DEVICE, DTYPE)
            for n, h in ((total_q, 32), (total_k, 8), (total_k, 8))
        ]

    sets = [tensors(i) for i in range(rotations(costs.forward_bytes))]
    bounds = (cu_q.to(DEVICE), cu_k.to(DEVICE), QUERIES, longest)

    def run(i):
        return varlen_attention(*sets[i], *bounds, backend=name)

    truth = reference.varlen_attention(*(x.double().cpu() for x in sets[0]), cu_q, cu_k)
    error = ((run(0).double().cpu() - truth).norm() / truth.norm()).item()
    assert error <= 1e-2
    peak = peak_over(run, lambda out: [out])
    source = torch.empty(64 << 20, device=DEVICE, dtype=torch.uint8)
    figures = measure(benchmark, run, len(sets), costs.forward_bytes, source)
    figures |= {"tflop_per_s": costs.flops / figures["ms"] / 1e9, "peak_bytes": peak}
    benchmark.extra_info.update(figures, error=error)
    record(op="attention", contender=name, error=error, **figures)
