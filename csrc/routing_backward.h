// d_weights[b,d,l] = sum over t and c of grad[d,t,c] * xhat[l,t,c].
#pragma once

#include "rows.h"

namespace sr {
namespace {

constexpr int64_t CHUNK = 16;          // tokens that share one partial gradient: fixed, so that sums are
constexpr int64_t GRAD_COLS = 16 * W;  // channels normalised at a time: their L rows and D rows of grad stay in L2
#ifdef __AVX512BF16__
#define SR_RAW_DOT
constexpr int64_t RAW_COLS = 512;  // channels of a raw bf16 tile
constexpr float RAW_MEAN = 8.f;    // a mean of more deviations is taken off before the product, not after
#endif

// What a dot over raw bf16 rows still lacks: acc += rstd[l] * (dot - mean[l] * sums[d]), lane by lane.
struct Centre {
  const float *mean, *rstd;
  const vec* sums;
};

// acc[d][l] += sum over the columns of g[d] * x[l], lane by lane, for a register tile of DB x LB.
template <int DB, int LB>
void dot(const float* g, const float* x, int64_t ld, int64_t cols, vec* acc, int64_t ld_acc, const Centre*, int) {
  vec a[DB][LB] = {};
  for (int64_t c = 0; c < cols; c += W) {
    vec xv[LB];
    SR_UNROLL for (int l = 0; l < LB; ++l) xv[l] = load(x + l * ld + c);
    SR_UNROLL for (int d = 0; d < DB; ++d) {
      vec gv = load(g + d * ld + c);
      SR_UNROLL for (int l = 0; l < LB; ++l) a[d][l] += gv * xv[l];
    }
  }
  SR_UNROLL for (int d = 0; d < DB; ++d) {
    SR_UNROLL for (int l = 0; l < LB; ++l) acc[d * ld_acc + l] += a[d][l];
  }
}

#ifdef SR_RAW_DOT
// The same over raw bf16, twice as fast: products of two bf16 are exact in fp32.
template <int DB, int LB>
void dot(const BFloat16* g, const BFloat16* x, int64_t ld, int64_t cols, vec* acc, int64_t ld_acc,
         const Centre* centre, int l0) {
  __m512 a[DB][LB] = {};
  for (int64_t c = 0; c < cols; c += P) {
    __m512bh xv[LB];
    SR_UNROLL for (int l = 0; l < LB; ++l) xv[l] = (__m512bh)_mm512_loadu_si512(x + l * ld + c);
    SR_UNROLL for (int d = 0; d < DB; ++d) {
      __m512bh gv = (__m512bh)_mm512_loadu_si512(g + d * ld + c);
      SR_UNROLL for (int l = 0; l < LB; ++l) a[d][l] = _mm512_dpbf16_ps(a[d][l], gv, xv[l]);
    }
  }
  SR_UNROLL for (int d = 0; d < DB; ++d) {
    SR_UNROLL for (int l = 0; l < LB; ++l)
      acc[d * ld_acc + l] += centre->rstd[l0 + l] * ((vec)a[d][l] - centre->mean[l0 + l] * centre->sums[d]);
  }
}
#endif

template <int LB, class E>
void dot_blocks(const E* g, const E* x, int64_t ld, int64_t cols, vec* acc, int64_t blocks, int64_t layers,
                Centre centre, int64_t l) {
  const vec* sums = centre.sums;
  auto run = [&](auto db, int64_t d) {
    if (sums) centre.sums = sums + d;
    dot<decltype(db)::value, LB>(g + d * ld, x + l * ld, ld, cols, acc + d * layers + l, layers, &centre, l);
  };
  int64_t d = 0;
  for (; d + 4 <= blocks; d += 4) run(Int<4>{}, d);
  for (; d + 2 <= blocks; d += 2) run(Int<2>{}, d);
  if (d < blocks) run(Int<1>{}, d);
}

template <class E>
void dot_all(const E* g, const E* x, int64_t ld, int64_t cols, vec* acc, int64_t blocks, int64_t layers,
             const Centre& centre) {
  constexpr int LB = TILE / 4;
  int64_t l = 0;
  for (; l + LB <= layers; l += LB) dot_blocks<LB>(g, x, ld, cols, acc, blocks, layers, centre, l);
  for (; l + 2 <= layers; l += 2) dot_blocks<2>(g, x, ld, cols, acc, blocks, layers, centre, l);
  if (l < layers) dot_blocks<1>(g, x, ld, cols, acc, blocks, layers, centre, l);
}

#ifdef SR_RAW_DOT
// n raw elements, zeros up to the next whole pair; prefetches as `pack` does.
template <class T>
void copy_raw(const T* p, int64_t n, int64_t next_row, T* to) {
  for (int64_t b = 0; b < n; b += P) {
    __builtin_prefetch(p + RAW_COLS + b);
    __builtin_prefetch(p + next_row + b, 0, 2);
  }
  int64_t c = 0;
  for (; c + P <= n; c += P) std::memcpy(static_cast<void*>(to + c), p + c, sizeof(T) * P);
  if (c < n) {
    std::memset(static_cast<void*>(to + c), 0, sizeof(T) * P);
    std::memcpy(static_cast<void*>(to + c), p + c, sizeof(T) * (n - c));
  }
}
#endif

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
struct Backward {
  const Rows<T>& x;
  const Tensor &grad, &mean, &rstd;
  const optional<Tensor>& out;
  const optional<Tensor>& grad_sumsq;
  int64_t layers = x.layers, tokens = x.tokens, channels = x.channels, blocks = grad.size(0);
  const float *m = mean.const_data_ptr<float>(), *r = rstd.const_data_ptr<float>();
  const T* g = grad.const_data_ptr<T>();
  const T* o = out ? out->const_data_ptr<T>() : nullptr;
  const float* gs = out ? grad_sumsq->const_data_ptr<float>() : nullptr;

  int64_t tile_floats() const { return (layers + blocks) * leading(GRAD_COLS); }

  void token(int64_t t, float* tile, vec* acc) const {
    const int64_t ld = leading(GRAD_COLS);
    for (int64_t c = 0; c < channels; c += GRAD_COLS) {
      const int64_t n = std::min(GRAD_COLS, channels - c);
      for (int64_t l = 0; l < layers; ++l)
        pack(x.row(l, t) + c, n, GRAD_COLS, x.stride[l], m[l * tokens + t], r[l * tokens + t], tile + l * ld);
      for (int64_t d = 0; d < blocks; ++d)
        pack_grad(g + d * grad.stride(0) + t * grad.stride(1) + c, o ? o + (d * tokens + t) * channels + c : nullptr,
                  o ? 2 * gs[d * tokens + t] : 0.f, n, GRAD_COLS, grad.stride(1), tile + (layers + d) * ld);
      dot_all(tile + layers * ld, tile, ld, round_up(n, P), acc, blocks, layers, {});
    }
  }

#ifdef SR_RAW_DOT
  // Whether raw rows may be centred after their dot: what then cancels is at most RAW_MEAN deviations.
  bool raw(int64_t t) const {
    if (o) return false;
    for (int64_t l = 0; l < layers; ++l)
      if (!(std::abs(m[l * tokens + t]) * r[l * tokens + t] < RAW_MEAN)) return false;
    return true;
  }

  void token_raw(int64_t t, BFloat16* tile, vec* acc, vec* sums, float* stats) const {
    constexpr int64_t ld = RAW_COLS + P;  // an odd number of 64-byte lines
    static_assert(ld * sizeof(BFloat16) <= (GRAD_COLS + 16) * sizeof(float), "it shares the scratch of `token`");
    for (int64_t l = 0; l < layers; ++l) stats[l] = m[l * tokens + t], stats[layers + l] = r[l * tokens + t];
    for (int64_t c = 0; c < channels; c += RAW_COLS) {
      const int64_t n = std::min(RAW_COLS, channels - c);
      for (int64_t l = 0; l < layers; ++l) copy_raw(x.row(l, t) + c, n, x.stride[l], tile + l * ld);
      for (int64_t d = 0; d < blocks; ++d) {
        BFloat16* to = tile + (layers + d) * ld;
        copy_raw(g + d * grad.stride(0) + t * grad.stride(1) + c, n, grad.stride(1), to);
        Pair s = {};
        for (int64_t i = 0; i < n; i += P) {
          const Pair v = load_pair(to + i);
          s.a += v.a, s.b += v.b;
        }
        sums[d] = s.a + s.b;
      }
      dot_all(tile + layers * ld, tile, ld, round_up(n, P), acc, blocks, layers, {stats, stats + layers, sums});
    }
  }
#endif

  void chunk(const Chunk& chunk, float* tile, vec* acc, float* extra, float* to) const {
    std::fill(acc, acc + blocks * layers, vec{});
    for (int64_t t = chunk.begin; t < chunk.end; ++t) {
#ifdef SR_RAW_DOT
      if constexpr (std::is_same_v<T, BFloat16>)
        if (raw(t)) {
          token_raw(t, reinterpret_cast<BFloat16*>(tile), acc, reinterpret_cast<vec*>(extra), extra + blocks * W);
          continue;
        }
#endif
      token(t, tile, acc);
    }
    for (int64_t i = 0; i < blocks * layers; ++i) to[i] = sum(acc[i]);
  }
};

}  // namespace
}  // namespace sr
