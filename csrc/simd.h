// Vectors of floats as the compiler's own vector type: any width, any architecture; intrinsics only as an addition.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace sr {

#if defined(__AVX512F__)
constexpr int W = 16;     // floats in a vector
constexpr int TILE = 24;  // accumulators of a register tile: 24 of the 32 registers
#elif defined(__AVX__)
constexpr int W = 8;
constexpr int TILE = 12;  // of 16 registers
#elif defined(__aarch64__)
constexpr int W = 4;
constexpr int TILE = 24;  // of 32 registers
#else
constexpr int W = 4;
constexpr int TILE = 12;
#endif
constexpr int P = 2 * W;  // elements of a pair of vectors, the unit in which rows are read and written

typedef float vec __attribute__((vector_size(4 * W)));
typedef uint32_t vec_u32 __attribute__((vector_size(4 * W)));

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

// A pair holds P consecutive elements, for 16-bit types the even ones in `a` and the odd ones in `b`: widening bf16 is
// then one shift and one mask, with no lane crossing. Nothing but load and store sees the order.
struct Pair {
  vec a, b;
};

inline Pair load_pair(const float* p) { return {load(p), load(p + W)}; }
inline Pair load_pair(const c10::BFloat16* p) {
  vec_u32 both;
  std::memcpy(&both, p, sizeof both);
  return {(vec)(both << 16), (vec)(both & 0xffff0000u)};
}
inline Pair load_pair(const c10::Half* p) {
  Pair x;
  for (int i = 0; i < W; ++i) x.a[i] = static_cast<float>(p[2 * i]), x.b[i] = static_cast<float>(p[2 * i + 1]);
  return x;
}

// Each element rounded once, to nearest even.
inline void store_pair(float* p, Pair x) { store(p, x.a), store(p + W, x.b); }
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
inline void store_pair(c10::BFloat16* p, Pair x) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)x.b, (__m512)x.a);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(order), halves));
}
#else
inline vec_u32 rounded_bf16(vec v) {  // in the upper halves
  vec_u32 bits = (vec_u32)v;
  vec_u32 r = bits + 0x7fff + ((bits >> 16) & 1);
  return (bits & 0x7fffffff) > 0x7f800000 ? (bits | 0x400000) : r;  // NaN stays NaN
}
inline void store_pair(c10::BFloat16* p, Pair x) {
  vec_u32 both = (rounded_bf16(x.a) >> 16) | (rounded_bf16(x.b) & 0xffff0000u);
  std::memcpy(static_cast<void*>(p), &both, sizeof both);
}
#endif
inline void store_pair(c10::Half* p, Pair x) {
  for (int i = 0; i < W; ++i) p[2 * i] = static_cast<c10::Half>(x.a[i]), p[2 * i + 1] = static_cast<c10::Half>(x.b[i]);
}

// The first n < P elements, then zeros; and ones in their place.
template <class T>
inline Pair load_part(const T* p, int64_t n) {
  T whole[P] = {};
  std::memcpy(static_cast<void*>(whole), p, n * sizeof(T));
  return load_pair(whole);
}
template <class T>
inline Pair ones_part(int64_t n) {
  T whole[P] = {};
  for (int i = 0; i < n; ++i) whole[i] = static_cast<T>(1.f);
  return load_pair(whole);
}
template <class T>
inline void store_part(T* p, Pair x, int64_t n) {
  T whole[P];
  store_pair(whole, x);
  std::memcpy(static_cast<void*>(p), whole, n * sizeof(T));
}

// s += x and q += x^2 over a pair, lane by lane.
template <class T>
inline void add_moments(const T* p, vec& s, vec& q) {
  const Pair x = load_pair(p);
  s += x.a + x.b;
  q += x.a * x.a + x.b * x.b;
}
#ifdef __AVX512BF16__
inline void add_moments(const c10::BFloat16* p, vec& s, vec& q) {
  const __m512bh x = (__m512bh)_mm512_loadu_si512(p), ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  s = (vec)_mm512_dpbf16_ps((__m512)s, x, ones);
  q = (vec)_mm512_dpbf16_ps((__m512)q, x, x);
}
#endif

inline float sum(vec v) {
  float x[W];
  std::memcpy(x, &v, sizeof v);
  for (int n = W / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  return x[0];
}

}  // namespace sr
