// Routing on the CPU: LayerNorm statistics, the fused weighted sum over layers, and the gradient of its weights.
//
// out[d,t,:] = sum_l weights[b(t),d,l] * xhat[l,t,:],  xhat[l,t,:] = (hidden[l,t,:] - mean[l,t]) * rstd[l,t].
//
// One token at a time: its L rows are read once from memory for their statistics, then from cache a tile of channels
// at a time: normalised into a scratch that stays in L1, and multiplied there by the [D x L] weights with a register
// tile of blocks x channels. Everything is fp32 and
// every result has a fixed order of sums, so that neither the number of threads nor the run changes a bit.
// Arguments are checked by sr_kernels/routing/op.py.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "simd.h"

namespace sr {
namespace {

using at::Tensor;
using std::optional;

constexpr float EPS = 1e-5f;       // eq. 2's LayerNorm
constexpr int64_t CHUNK = 16;      // tokens that share one partial gradient: fixed, so that sums are
constexpr int64_t COLS = 8 * W;    // channels normalised at a time: their L rows stay in L1
constexpr int64_t GRAD_COLS = 16 * W;  // the same for the gradient, where rows of grad join them: L2

#define SR_UNROLL _Pragma("GCC unroll 32")

#define SR_DISPATCH(TYPE, ...)                                                        \
  AT_DISPATCH_SWITCH(TYPE, "sr_kernels", AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)     \
                     AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__) AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<float[], Free>;
Scratch scratch(int64_t floats) {
  return Scratch(static_cast<float*>(std::aligned_alloc(64, round_up(floats * 4, 64))));
}

// Leading dimension of a scratch of n channels: whole vectors, and an odd number of 64-byte lines, so that the rows
// of one column do not fall into the same cache sets.
int64_t leading(int64_t n) { return round_up(n, 16) | 16; }

// Large outputs are written once, front to back: huge pages save 500 page faults of every 512.
void want_huge_pages(const Tensor& x) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  auto begin = (reinterpret_cast<uintptr_t>(x.data_ptr()) + page - 1) / page * page;
  auto end = (reinterpret_cast<uintptr_t>(x.data_ptr()) + x.nbytes()) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The rows hidden[l, t, :], from one [L,T,C] tensor or from L tensors [T,C].
template <class T>
struct Rows {
  int64_t layers, tokens, channels;
  std::vector<const T*> base;
  std::vector<int64_t> stride;

  explicit Rows(at::TensorList hidden) {
    const Tensor& first = hidden[0];
    tokens = first.size(-2), channels = first.size(-1);
    layers = first.dim() == 3 ? first.size(0) : static_cast<int64_t>(hidden.size());
    for (int64_t l = 0; l < layers; ++l) {
      const Tensor& x = first.dim() == 3 ? first : hidden[l];
      base.push_back(x.const_data_ptr<T>() + (first.dim() == 3 ? l * x.stride(0) : 0));
      stride.push_back(x.stride(-2));
    }
  }
  const T* row(int64_t l, int64_t t) const { return base[l] + t * stride[l]; }
};

// Mean and 1/deviation of a row that stays in L1. The mean is corrected once by the mean of what it leaves, so that
// a constant row centres to zero and a mean of many deviations costs nothing; the variance is that of the centred row.
template <class T>
std::pair<float, float> row_stats(const T* p, int64_t n) {
  const int64_t whole = n / P * P;
  vec s[4] = {};
  int64_t c = 0;
  for (; c + 2 * P <= n; c += 2 * P) {
    Pair x = load_pair(p + c), y = load_pair(p + c + P);
    s[0] += x.a, s[1] += x.b, s[2] += y.a, s[3] += y.b;
  }
  for (; c < whole; c += P) s[0] += load_pair(p + c).a, s[1] += load_pair(p + c).b;
  float total = sum((s[0] + s[1]) + (s[2] + s[3]));
  for (; c < n; ++c) total += static_cast<float>(p[c]);
  const float mean = total / n;
  vec d[4] = {}, q[4] = {};
  auto add = [&](int i, vec v) {
    v -= mean;
    d[i] += v;
    q[i] += v * v;
  };
  for (c = 0; c + 2 * P <= n; c += 2 * P) {
    Pair x = load_pair(p + c), y = load_pair(p + c + P);
    add(0, x.a), add(1, x.b), add(2, y.a), add(3, y.b);
  }
  for (; c < whole; c += P) {
    Pair x = load_pair(p + c);
    add(0, x.a), add(1, x.b);
  }
  float left = sum((d[0] + d[1]) + (d[2] + d[3])), squares = sum((q[0] + q[1]) + (q[2] + q[3]));
  for (; c < n; ++c) {
    const float v = static_cast<float>(p[c]) - mean;
    left += v, squares += v * v;
  }
  left /= n;
  const float variance = squares / n - left * left;
  return {mean + left, 1.f / std::sqrt(std::max(variance, 0.f) + EPS)};
}

// xhat of n channels into `to`, zeros up to `width`. The row's next tile and the next token's, `next_row`
// elements further on, are fetched meanwhile: rows of a tile share cache sets, and no hardware prefetcher follows them.
template <class T>
void pack(const T* p, int64_t n, int64_t width, int64_t next_row, float mean, float rstd, float* to) {
  for (int64_t b = 0; b < n; b += 64 / sizeof(T)) {
    __builtin_prefetch(p + width + b);
    __builtin_prefetch(p + next_row + b, 0, 2);
  }
  int64_t c = 0;
  for (; c + P <= n; c += P) {
    Pair x = load_pair(p + c);
    store_pair(to + c, {(x.a - mean) * rstd, (x.b - mean) * rstd});
  }
  if (c < n) {
    Pair x = load_part(p + c, n - c), ones = ones_part<T>(n - c);
    store_pair(to + c, {(x.a - mean) * rstd * ones.a, (x.b - mean) * rstd * ones.b});
    c += P;
  }
  for (; c < width; c += P) store_pair(to + c, Pair{});
}

// --- forward ---------------------------------------------------------------------------------------------------------

// out[d, 0:n] = sum_l w[l, d] * x[l, 0:n] for DB blocks and VB vectors of channels; squares[d] += out^2 before rounding.
template <int DB, int VB, class T>
void mix(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t layers, T* out, int64_t ldo, int64_t n,
         vec* squares) {
  vec acc[DB][VB] = {};
  for (int64_t l = 0; l < layers; ++l, x += ldx, w += ldw) {
    vec xv[VB];
    SR_UNROLL for (int v = 0; v < VB; ++v) xv[v] = load(x + v * W);
    SR_UNROLL for (int d = 0; d < DB; ++d) {
      SR_UNROLL for (int v = 0; v < VB; ++v) acc[d][v] += w[d] * xv[v];
    }
  }
  SR_UNROLL for (int d = 0; d < DB; ++d) {
    SR_UNROLL for (int v = 0; v < VB; v += 2) {
      const Pair y = {acc[d][v], acc[d][v + 1]};
      if (squares) squares[d] += y.a * y.a + y.b * y.b;
      if (n >= (v + 2) * W) store_pair(out + d * ldo + v * W, y);
      else if (n > v * W) store_part(out + d * ldo + v * W, y, n - v * W);
    }
  }
}

template <int N>
using Int = std::integral_constant<int, N>;

// out[:, 0:n] of one token from a tile of COLS normalised channels x [L, ldx].
template <class T>
void mix_tile(const float* x, int64_t ldx, const float* w, int64_t blocks, int64_t layers, T* out, int64_t ldo,
              int64_t n, vec* squares) {
  for (int64_t d = 0; d < blocks;) {
    auto run = [&](auto db, auto vb) {
      constexpr int DB = decltype(db)::value, VB = decltype(vb)::value;
      for (int64_t c = 0; c < n; c += VB * W)
        mix<DB, VB>(x + c, ldx, w + d, blocks, layers, out + d * ldo + c, ldo, n - c, squares ? squares + d : nullptr);
      d += DB;
    };
    const int64_t left = blocks - d;
    if (left >= 12 && TILE == 24) run(Int<12>{}, Int<2>{});
    else if (left >= 6) run(Int<6>{}, Int<TILE / 6>{});
    else if (left >= 3) run(Int<3>{}, Int<TILE / 6>{});
    else if (left >= 2) run(Int<2>{}, Int<TILE / 6>{});
    else run(Int<1>{}, Int<8>{});
  }
}

// weights [(B,) D, L], any strides, as [B][L][D].
std::vector<float> transposed(const Tensor& weights) {
  const bool per_sample = weights.dim() == 3;
  const int64_t batch = per_sample ? weights.size(0) : 1, blocks = weights.size(-2), layers = weights.size(-1);
  const int64_t sb = per_sample ? weights.stride(0) : 0, sd = weights.stride(-2), sl = weights.stride(-1);
  const float* w = weights.const_data_ptr<float>();
  std::vector<float> to(batch * layers * blocks);
  float* p = to.data();
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t l = 0; l < layers; ++l)
      for (int64_t d = 0; d < blocks; ++d) *p++ = w[b * sb + d * sd + l * sl];
  return to;
}

// `given`: mean and rstd are read; otherwise taken from the rows and written.
template <class T>
void route_rows(const Rows<T>& x, const Tensor& weights, const optional<Tensor>& cu_seqlens, float* mean, float* rstd,
                bool given, Tensor& out, float* sumsq) {
  const int64_t layers = x.layers, tokens = x.tokens, channels = x.channels, blocks = weights.size(-2);
  const auto w = transposed(weights);
  const int32_t* bounds = weights.dim() == 3 ? cu_seqlens->const_data_ptr<int32_t>() : nullptr;
  T* const to = out.data_ptr<T>();
  const int64_t ld = leading(COLS);
  at::parallel_for(0, tokens, 1, [&](int64_t begin, int64_t end) {
    auto tile = scratch(layers * ld), lanes = scratch(sumsq ? blocks * W : 0);
    vec* squares = sumsq ? reinterpret_cast<vec*>(lanes.get()) : nullptr;
    int64_t sample = 0;
    for (int64_t t = begin; t < end; ++t) {
      while (bounds && bounds[sample + 1] <= t) ++sample;
      if (!given)
        for (int64_t l = 0; l < layers; ++l)
          std::tie(mean[l * tokens + t], rstd[l * tokens + t]) = row_stats(x.row(l, t), channels);
      if (sumsq) std::fill(squares, squares + blocks, vec{});
      for (int64_t c = 0; c < channels; c += COLS) {
        const int64_t n = std::min(COLS, channels - c);
        for (int64_t l = 0; l < layers; ++l)
          pack(x.row(l, t) + c, n, COLS, x.stride[l], mean[l * tokens + t], rstd[l * tokens + t], tile.get() + l * ld);
        mix_tile(tile.get(), ld, w.data() + sample * layers * blocks, blocks, layers, to + t * channels + c,
                 tokens * channels, n, squares);
      }
      if (sumsq)
        for (int64_t d = 0; d < blocks; ++d) sumsq[d * tokens + t] = sum(squares[d]);
    }
  });
}

// --- backward --------------------------------------------------------------------------------------------------------

// acc[d][l] += sum over the columns of g[d] * x[l], lane by lane, for a register tile of DB x LB.
template <int DB, int LB>
void dot(const float* g, const float* x, int64_t ld, int64_t cols, vec* acc, int64_t ld_acc) {
  vec a[DB][LB];
  SR_UNROLL for (int d = 0; d < DB; ++d) {
    SR_UNROLL for (int l = 0; l < LB; ++l) a[d][l] = acc[d * ld_acc + l];
  }
  for (int64_t c = 0; c < cols; c += W) {
    vec xv[LB];
    SR_UNROLL for (int l = 0; l < LB; ++l) xv[l] = load(x + l * ld + c);
    SR_UNROLL for (int d = 0; d < DB; ++d) {
      vec gv = load(g + d * ld + c);
      SR_UNROLL for (int l = 0; l < LB; ++l) a[d][l] += gv * xv[l];
    }
  }
  SR_UNROLL for (int d = 0; d < DB; ++d) {
    SR_UNROLL for (int l = 0; l < LB; ++l) acc[d * ld_acc + l] = a[d][l];
  }
}

template <int LB>
void dot_blocks(const float* g, const float* x, int64_t ld, int64_t cols, vec* acc, int64_t blocks, int64_t layers) {
  int64_t d = 0;
  for (; d + 4 <= blocks; d += 4) dot<4, LB>(g + d * ld, x, ld, cols, acc + d * layers, layers);
  for (; d + 2 <= blocks; d += 2) dot<2, LB>(g + d * ld, x, ld, cols, acc + d * layers, layers);
  if (d < blocks) dot<1, LB>(g + d * ld, x, ld, cols, acc + d * layers, layers);
}

void dot_all(const float* g, const float* x, int64_t ld, int64_t cols, vec* acc, int64_t blocks, int64_t layers) {
  constexpr int LB = TILE / 4;
  int64_t l = 0;
  for (; l + LB <= layers; l += LB) dot_blocks<LB>(g, x + l * ld, ld, cols, acc + l, blocks, layers);
  for (; l + 2 <= layers; l += 2) dot_blocks<2>(g, x + l * ld, ld, cols, acc + l, blocks, layers);
  if (l < layers) dot_blocks<1>(g, x + l * ld, ld, cols, acc + l, blocks, layers);
}

struct Chunk {
  int64_t sample, begin, end;
};

// At most CHUNK tokens of one sample each, whatever the number of threads.
std::vector<Chunk> chunks_of(const optional<Tensor>& cu_seqlens, int64_t tokens) {
  std::vector<Chunk> chunks;
  const int64_t batch = cu_seqlens ? cu_seqlens->numel() - 1 : 1;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t from = cu_seqlens ? cu_seqlens->const_data_ptr<int32_t>()[b] : 0;
    const int64_t to = cu_seqlens ? cu_seqlens->const_data_ptr<int32_t>()[b + 1] : tokens;
    for (int64_t t = from; t < to; t += CHUNK) chunks.push_back({b, t, std::min(t + CHUNK, to)});
  }
  return chunks;
}

// grad[d] of one token as floats, with the gradient that reached sum(out^2) added: g + 2 * gs * out.
template <class T>
void pack_grad(const T* g, const T* out, float twice_gs, int64_t n, int64_t width, int64_t next_row, float* to) {
  pack(g, n, width, next_row, 0.f, 1.f, to);
  if (!out) return;
  for (int64_t c = 0; c < n; c += P) {
    const Pair o = c + P <= n ? load_pair(out + c) : load_part(out + c, n - c);
    store_pair(to + c, {load(to + c) + twice_gs * o.a, load(to + c + W) + twice_gs * o.b});
  }
}

template <class T>
void backward_chunk(const Rows<T>& x, const Tensor& grad, const float* mean, const float* rstd, const Tensor* out,
                    const float* grad_sumsq, const Chunk& chunk, float* tile, vec* acc, float* to) {
  const int64_t layers = x.layers, tokens = x.tokens, channels = x.channels, blocks = grad.size(0);
  const int64_t ld = leading(GRAD_COLS);
  std::fill(acc, acc + blocks * layers, vec{});
  for (int64_t t = chunk.begin; t < chunk.end; ++t)
    for (int64_t c = 0; c < channels; c += GRAD_COLS) {
      const int64_t n = std::min(GRAD_COLS, channels - c);
      for (int64_t l = 0; l < layers; ++l)
        pack(x.row(l, t) + c, n, GRAD_COLS, x.stride[l], mean[l * tokens + t], rstd[l * tokens + t], tile + l * ld);
      for (int64_t d = 0; d < blocks; ++d) {
        const T* g = grad.const_data_ptr<T>() + d * grad.stride(0) + t * grad.stride(1) + c;
        const T* o = out ? out->const_data_ptr<T>() + (d * tokens + t) * channels + c : nullptr;
        const float twice_gs = out ? 2 * grad_sumsq[d * tokens + t] : 0.f;
        pack_grad(g, o, twice_gs, n, GRAD_COLS, grad.stride(1), tile + (layers + d) * ld);
      }
      dot_all(tile + layers * ld, tile, ld, round_up(n, P), acc, blocks, layers);
    }
  for (int64_t i = 0; i < blocks * layers; ++i) to[i] = sum(acc[i]);
}

// --- the ops ---------------------------------------------------------------------------------------------------------

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
  return SR_DISPATCH(hidden[0].scalar_type(), [&] {
    const Rows<scalar_t> x(hidden);
    const int64_t blocks = weights.size(-2);
    auto out = at::empty({blocks, x.tokens, x.channels}, hidden[0].options());
    auto squares = sumsq ? at::empty({blocks, x.tokens}, weights.options()) : at::empty({0}, weights.options());
    want_huge_pages(out);
    route_rows(x, weights, cu_seqlens, mean.data_ptr<float>(), rstd.data_ptr<float>(), given, out,
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
                      const optional<Tensor>& cu_seqlens, const optional<Tensor>& out,
                      const optional<Tensor>& grad_sumsq_) {
  const auto grad = grad_.stride(-1) == 1 || grad_.size(-1) == 1 ? grad_ : grad_.contiguous();
  const auto mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const auto grad_sumsq = out ? grad_sumsq_->contiguous() : Tensor();
  return SR_DISPATCH(hidden[0].scalar_type(), [&] {
    const Rows<scalar_t> x(hidden);
    const int64_t blocks = grad.size(0), size = blocks * x.layers;
    const auto chunks = chunks_of(cu_seqlens, x.tokens);
    std::vector<float> partials(chunks.size() * size);
    at::parallel_for(0, chunks.size(), 1, [&](int64_t begin, int64_t end) {
      auto tile = scratch((x.layers + blocks) * leading(GRAD_COLS)), acc = scratch(size * W);
      for (int64_t i = begin; i < end; ++i)
        backward_chunk(x, grad, mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(), out ? &*out : nullptr,
                       out ? grad_sumsq.const_data_ptr<float>() : nullptr, chunks[i], tile.get(),
                       reinterpret_cast<vec*>(acc.get()), partials.data() + i * size);
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
