// out[d,t,:] = sum over l of weights[b(t),d,l] * xhat[l,t,:].
#pragma once

#include "rows.h"

namespace sr {
namespace {

constexpr int64_t COLS = 8 * W;  // channels normalised at a time: their L rows stay in L1

// out[d, 0:n] = sum_l w[l, d] * x[l, 0:n] for DB blocks and VB vectors of channels; squares[d] += out^2 before rounding.
// ahead: the next token's rows, or null; their channels from `at` on are fetched into L2 between the products, since the
// misses of a whole tile at once would hold up its packing.
template <int DB, int VB, class T>
void mix(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t layers, T* out, int64_t ldo, int64_t n,
         vec* squares, const T* const* ahead, int64_t at) {
  vec acc[DB][VB] = {};
  for (int64_t l = 0; l < layers; ++l, x += ldx, w += ldw) {
    if (ahead) {
      SR_UNROLL for (int b = 0; b < VB * W; b += 64 / sizeof(T)) __builtin_prefetch(ahead[l] + at + b, 0, 2);
    }
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

// out[:, 0:n] of one token from a tile of COLS normalised channels x [L, ldx].
template <class T>
void mix_tile(const float* x, int64_t ldx, const float* w, int64_t blocks, int64_t layers, T* out, int64_t ldo,
              int64_t n, vec* squares, const T* const* ahead, int64_t at) {
  for (int64_t d = 0; d < blocks;) {
    auto run = [&](auto db, auto vb) {
      constexpr int DB = decltype(db)::value, VB = decltype(vb)::value;
      for (int64_t c = 0; c < n; c += VB * W)
        mix<DB, VB>(x + c, ldx, w + d, blocks, layers, out + d * ldo + c, ldo, n - c, squares ? squares + d : nullptr,
                    d == 0 ? ahead : nullptr, at + c);
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
  const int64_t step = std::clamp<int64_t>(tokens / (8 * at::get_num_threads()), 1, 16);
  parallel_ranges(tokens, step, [&] {
    return [&, tile = scratch(layers * ld), lanes = scratch(sumsq ? blocks * W : 0),
            ahead = std::vector<const T*>(layers)](int64_t begin, int64_t end) mutable {
      vec* squares = sumsq ? reinterpret_cast<vec*>(lanes.get()) : nullptr;
      int64_t sample = 0;
      for (int64_t t = begin; t < end; ++t) {
        while (bounds && bounds[sample + 1] <= t) ++sample;
        if (!given)
          for (int64_t l = 0; l < layers; ++l)
            std::tie(mean[l * tokens + t], rstd[l * tokens + t]) = row_stats(x.row(l, t), channels);
        if (sumsq) std::fill(squares, squares + blocks, vec{});
        const bool spread = blocks >= 6 && t + 1 < tokens;  // fewer products are over before the misses
        if (spread)
          for (int64_t l = 0; l < layers; ++l) ahead[l] = x.row(l, t + 1);
        for (int64_t c = 0; c < channels; c += COLS) {
          const int64_t n = std::min(COLS, channels - c);
          for (int64_t l = 0; l < layers; ++l)
            pack(x.row(l, t) + c, n, COLS, spread ? 0 : x.stride[l], mean[l * tokens + t], rstd[l * tokens + t],
                 tile.get() + l * ld);
          mix_tile(tile.get(), ld, w.data() + sample * layers * blocks, blocks, layers, to + t * channels + c,
                   tokens * channels, n, squares, spread ? ahead.data() : nullptr, c);
        }
        if (sumsq)
          for (int64_t d = 0; d < blocks; ++d) sumsq[d * tokens + t] = sum(squares[d]);
      }
    };
  });
}

}  // namespace
}  // namespace sr
