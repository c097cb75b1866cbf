// Routing on the CPU: LayerNorm statistics, the fused weighted sum over layers, and the gradient of its weights.
//
// out[d,t,:] = sum_l weights[b(t),d,l] * xhat[l,t,:],  xhat[l,t,:] = (hidden[l,t,:] - mean[l,t]) * rstd[l,t].
//
// One token at a time: its L rows are read once from memory for their statistics, then from cache a tile of channels
// at a time: normalised into a scratch that stays in L1, and multiplied there by the [D x L] weights with a register
// tile of blocks x channels. Everything is fp32 and
// every result has a fixed order of sums, so that neither the number of threads nor the run changes a bit.
// Arguments are checked by sr_kernels/routing/op.py, save the values of cu_seqlens in a compiled graph.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "routing_backward.h"
#include "routing_forward.h"

namespace sr {
namespace {

#define SR_DISPATCH(TYPE, ...)                                                        \
  AT_DISPATCH_SWITCH(TYPE, "sr_kernels", AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)     \
                     AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__) AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

std::tuple<Tensor, Tensor> layer_stats(at::TensorList hidden) {
  return SR_DISPATCH(hidden[0].scalar_type(), [&] {
    const Rows<scalar_t> x(hidden);
    auto mean = at::empty({x.layers, x.tokens}, hidden[0].options().dtype(at::kFloat));
    auto rstd = at::empty({x.layers, x.tokens}, mean.options());
    float *m = mean.data_ptr<float>(), *r = rstd.data_ptr<float>();
    at::parallel_for(0, x.layers * x.tokens, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        std::tie(m[i], r[i]) = row_stats(x.row(i / x.tokens, i % x.tokens), x.channels);
    });
    return std::make_tuple(mean, rstd);
  });
}

// out and, if wanted, sum of out^2; `given`: mean and rstd are read, otherwise written.
std::tuple<Tensor, Tensor> route_any(at::TensorList hidden, const Tensor& weights, const Tensor& mean,
                                     const Tensor& rstd, bool given, const optional<Tensor>& cu_seqlens, bool sumsq) {
  const auto bounds = checked_bounds(cu_seqlens, hidden[0].size(-2));
  return SR_DISPATCH(hidden[0].scalar_type(), [&] {
    const Rows<scalar_t> x(hidden);
    const int64_t blocks = weights.size(-2);
    auto out = at::empty({blocks, x.tokens, x.channels}, hidden[0].options());
    auto squares = sumsq ? at::empty({blocks, x.tokens}, weights.options()) : at::empty({0}, weights.options());
    want_huge_pages(out);
    route_rows(x, weights, bounds, mean.data_ptr<float>(), rstd.data_ptr<float>(), given, out,
               sumsq ? squares.data_ptr<float>() : nullptr);
    return std::make_tuple(out, squares);
  });
}

std::tuple<Tensor, Tensor> route(at::TensorList hidden, const Tensor& weights, const Tensor& mean, const Tensor& rstd,
                                 const optional<Tensor>& cu_seqlens, bool sumsq) {
  return route_any(hidden, weights, mean.contiguous(), rstd.contiguous(), true, cu_seqlens, sumsq);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> route_fused(at::TensorList hidden, const Tensor& weights,
                                                       const optional<Tensor>& cu_seqlens, bool sumsq) {
  auto mean = at::empty({weights.size(-1), hidden[0].size(-2)}, weights.options());
  auto rstd = at::empty({weights.size(-1), hidden[0].size(-2)}, weights.options());
  auto [out, squares] = route_any(hidden, weights, mean, rstd, false, cu_seqlens, sumsq);
  return {out, squares, mean, rstd};
}

Tensor route_backward(const Tensor& grad_, at::TensorList hidden, const Tensor& mean_, const Tensor& rstd_,
                      const optional<Tensor>& cu_seqlens_, const optional<Tensor>& out,
                      const optional<Tensor>& grad_sumsq_) {
  const auto cu_seqlens = checked_bounds(cu_seqlens_, hidden[0].size(-2));
  const auto grad = grad_.stride(-1) == 1 || grad_.size(-1) == 1 ? grad_ : grad_.contiguous();
  const auto mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const auto grad_sumsq = out ? optional<Tensor>(grad_sumsq_->contiguous()) : std::nullopt;
  return SR_DISPATCH(hidden[0].scalar_type(), [&] {
    const Rows<scalar_t> x(hidden);
    const int64_t blocks = grad.size(0), size = blocks * x.layers;
    const auto chunks = chunks_of(cu_seqlens, x.tokens);
    std::vector<float> partials(chunks.size() * size);
    const Backward<scalar_t> backward{x, grad, mean, rstd, out, grad_sumsq};
    parallel_ranges(chunks.size(), 1, [&] {
      return [&, tile = scratch(backward.tile_floats()), acc = scratch(size * W),
              extra = scratch(blocks * W + 2 * x.layers)](int64_t i, int64_t) {
        backward.chunk(chunks[i], tile.get(), reinterpret_cast<vec*>(acc.get()), extra.get(),
                       partials.data() + i * size);
      };
    });
    const int64_t batch = cu_seqlens ? cu_seqlens->numel() - 1 : 1;
    std::vector<double> total(batch * size);  // summed in the order of the chunks
    for (size_t i = 0; i < chunks.size(); ++i)
      for (int64_t j = 0; j < size; ++j) total[chunks[i].sample * size + j] += partials[i * size + j];
    auto result = cu_seqlens ? at::empty({batch, blocks, x.layers}, mean.options())
                             : at::empty({blocks, x.layers}, mean.options());
    std::copy(total.begin(), total.end(), result.data_ptr<float>());
    return result;
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(sr_kernels, CPU, m) {  // the schemas are in sr_kernels/routing/native.py
  m.impl("native_layer_stats", layer_stats);
  m.impl("native_route", route);
  m.impl("native_route_fused", route_fused);
  m.impl("native_route_backward", route_backward);
}

}  // namespace sr
