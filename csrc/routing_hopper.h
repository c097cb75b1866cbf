// The Hopper routing kernel as its caller sees it: arguments, sizes, launch. Plain C++.
#pragma once

#include <cstdint>

namespace sr {

constexpr int MAX_LAYERS = 48;        // six tensor-core steps of 8
constexpr int MAX_BLOCKS = 24;        // three tensor-core tiles of 8
constexpr int MAX_STAGES = 4;         // tokens in flight
constexpr int SHARED_BYTES = 232448;  // of a block, at most
constexpr int HEAD_BYTES = 3200;      // of them for barriers, moments, statistics and row factors
constexpr int PAD_BYTES = 16;         // rows start 16 bytes past a multiple of 128: no bank conflicts, see product()

struct Arguments {
  const void* rows[MAX_LAYERS];  // hidden[l, 0, 0], bf16, at multiples of 16 bytes
  int64_t stride;                // elements from token to token, a multiple of 8
  const float* weights;          // [samples, blocks, layers]
  const int32_t* bounds;         // [samples + 1]: the samples' tokens; null: one sample
  float *mean, *rstd;            // [layers, tokens]: read where `given`, else written
  void* out;                     // [blocks, tokens, channels], bf16
  float* squares;                // [2, blocks, tokens]: sum of out^2 over half of the channels; or null
  int64_t tokens;
  int64_t plane;  // bytes of a block's output: 2 * tokens * channels
  int layers, blocks, channels, samples, stages;
  bool given;
};

constexpr int64_t stage_bytes(int64_t layers, int64_t channels) { return layers * (channels + PAD_BYTES); }

// Tokens that a block's shared memory holds; 0: not even one.
constexpr int stages_that_fit(int64_t layers, int64_t channels) {
  const int64_t fit = (SHARED_BYTES - HEAD_BYTES) / stage_bytes(layers, channels);
  return static_cast<int>(fit < MAX_STAGES ? fit : MAX_STAGES);
}

// Launch on a CUDA stream of the current device; null, or what is wrong.
const char* hopper_route(const Arguments& a, int multiprocessors, void* stream);

}  // namespace sr
