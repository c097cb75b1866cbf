// The rows of hidden, their LayerNorm statistics, and tiles of them normalised into a scratch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "simd.h"

namespace sr {
namespace {

using at::BFloat16;
using at::Tensor;
using std::optional;

constexpr float EPS = 1e-5f;  // eq. 2's LayerNorm

#define SR_UNROLL _Pragma("GCC unroll 32")

template <int N>
using Int = std::integral_constant<int, N>;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<float[], Free>;
Scratch scratch(int64_t floats) {
  auto* p = static_cast<float*>(std::aligned_alloc(64, round_up(floats * 4, 64)));
  TORCH_CHECK_WITH(OutOfMemoryError, p || !floats, "routing: no memory for a scratch of ", floats, " floats");
  return Scratch(p);
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

// Each thread makes a worker with make(), then calls it on ranges [begin, end) of 0..n, whichever is next: a thread that
// is held up holds up no other. For work whose result does not depend on who does it.
template <class Make>
void parallel_ranges(int64_t n, int64_t step, const Make& make) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (n + step - 1) / step);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto work = make();
    for (int64_t begin; (begin = next.fetch_add(step)) < n;) work(begin, std::min(begin + step, n));
  });
}

// The samples' bounds in 0..tokens, contiguous; their values are checked here too, since a compiled graph reads none.
optional<Tensor> checked_bounds(const optional<Tensor>& cu_seqlens, int64_t tokens) {
  if (!cu_seqlens) return std::nullopt;
  auto bounds = cu_seqlens->contiguous();
  const c10::ArrayRef<int32_t> values(bounds.const_data_ptr<int32_t>(), bounds.numel());
  TORCH_CHECK_VALUE(values.size() >= 2 && values.front() == 0 && values.back() == tokens &&
                        std::is_sorted(values.begin(), values.end()),
                    "cu_seqlens: wanted non-decreasing values from 0 to ", tokens, ", got ", values);
  return bounds;
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

// Mean and 1/deviation of a row that stays in L1: from the sums of x and x^2 where the mean is at most two deviations,
// so that their difference keeps its digits; else from a second pass over the centred row, which also corrects the mean
// by the mean of what it leaves: a constant row centres to zero.
template <class T>
std::pair<float, float> row_stats(const T* p, int64_t n) {
  const int64_t whole = n / P * P;
  vec s[4] = {}, q[4] = {};
  int64_t c = 0;
  for (; c + 4 * P <= n; c += 4 * P) {
    SR_UNROLL for (int i = 0; i < 4; ++i) add_moments(p + c + i * P, s[i], q[i]);
  }
  for (; c < whole; c += P) add_moments(p + c, s[0], q[0]);
  float total = sum((s[0] + s[1]) + (s[2] + s[3])), squares = sum((q[0] + q[1]) + (q[2] + q[3]));
  for (; c < n; ++c) {
    const float v = static_cast<float>(p[c]);
    total += v, squares += v * v;
  }
  const float mean = total / n, raw = squares / n - mean * mean;
  if (4 * raw > mean * mean) return {mean, 1.f / std::sqrt(raw + EPS)};

  vec d[2] = {}, e[2] = {};
  float left = 0;
  squares = 0;
  for (c = 0; c < whole; c += P) {
    Pair x = load_pair(p + c);
    x.a -= mean, x.b -= mean;
    d[0] += x.a, d[1] += x.b;
    e[0] += x.a * x.a, e[1] += x.b * x.b;
  }
  for (; c < n; ++c) {
    const float v = static_cast<float>(p[c]) - mean;
    left += v, squares += v * v;
  }
  left = (left + sum(d[0] + d[1])) / n;
  const float variance = (squares + sum(e[0] + e[1])) / n - left * left;
  return {mean + left, 1.f / std::sqrt(std::max(variance, 0.f) + EPS)};
}

// xhat of n channels into `to`, zeros up to `width`. The row's next tile and the next token's, `next_row` elements
// further on (0: not here), are fetched meanwhile: rows of a tile share cache sets, and no hardware prefetcher follows.
template <class T>
void pack(const T* p, int64_t n, int64_t width, int64_t next_row, float mean, float rstd, float* to) {
  for (int64_t b = 0; b < n; b += 64 / sizeof(T)) {
    __builtin_prefetch(p + width + b);
    if (next_row) __builtin_prefetch(p + next_row + b, 0, 2);
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

}  // namespace
}  // namespace sr
