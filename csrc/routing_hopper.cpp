// The Hopper routing kernel's ops. Shapes, dtypes and strides are checked by sr_kernels/routing/hopper.py.

#include "routing_hopper.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace sr {
namespace {

using at::Tensor;
using std::optional;

// out and, if wanted, sum of out^2; `given`: mean and rstd are read, otherwise written.
std::tuple<Tensor, Tensor> route_any(at::TensorList hidden, const Tensor& weights_, const Tensor& mean,
                                     const Tensor& rstd, bool given, const optional<Tensor>& cu_seqlens, bool sumsq) {
  const c10::cuda::CUDAGuard guard(hidden[0].device());
  const auto weights = weights_.contiguous();
  const bool per_sample = weights.dim() == 3;
  const auto bounds = per_sample ? cu_seqlens->contiguous() : Tensor();
  const int64_t layers = weights.size(-1), blocks = weights.size(-2);
  const int64_t tokens = hidden[0].size(-2), channels = hidden[0].size(-1);
  auto out = at::empty({blocks, tokens, channels}, hidden[0].options());
  auto squares = sumsq ? at::empty({2, blocks, tokens}, weights.options()) : at::empty({0}, weights.options());
  Arguments a{};
  const bool one = hidden[0].dim() == 3;
  for (int64_t l = 0; l < layers; ++l) {
    const auto* row = static_cast<const char*>((one ? hidden[0] : hidden[l]).const_data_ptr());
    a.rows[l] = row + (one ? l * hidden[0].stride(0) * 2 : 0);
    const auto past = reinterpret_cast<uintptr_t>(a.rows[l]) % 16;
    TORCH_CHECK_VALUE(!past, one ? "hidden" : c10::str("hidden[", l, "]"),
                      ": wanted an address at a multiple of 16 with the native backend on CUDA, got ", past,
                      " past one");
  }
  a.stride = hidden[0].stride(-2);
  a.weights = weights.const_data_ptr<float>();
  a.bounds = per_sample ? bounds.const_data_ptr<int32_t>() : nullptr;
  a.mean = mean.data_ptr<float>();
  a.rstd = rstd.data_ptr<float>();
  a.out = out.data_ptr();
  a.squares = sumsq ? squares.data_ptr<float>() : nullptr;
  a.tokens = tokens;
  a.plane = 2 * tokens * channels;
  a.layers = static_cast<int>(layers);
  a.blocks = static_cast<int>(blocks);
  a.channels = static_cast<int>(channels);
  a.samples = per_sample ? static_cast<int>(weights.size(0)) : 1;
  a.stages = stages_that_fit(layers, channels);
  a.given = given;
  int multiprocessors = 0;
  const auto error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, guard.current_device().index());
  TORCH_CHECK(error == cudaSuccess, "routing: ", cudaGetErrorString(error));
  const char* wrong = hopper_route(a, multiprocessors, c10::cuda::getCurrentCUDAStream().stream());
  TORCH_CHECK(!wrong, "routing: ", wrong);
  return {out, sumsq ? squares.sum(0) : squares};
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

}  // namespace

TORCH_LIBRARY_IMPL(sr_kernels, CUDA, m) {  // the schemas are in sr_kernels/routing/native.py
  m.impl("native_route", route);
  m.impl("native_route_fused", route_fused);
}

}  // namespace sr
