// The Hopper kernel on a CPU, for tests/sr_kernels/test_routing_hopper.py.

#define SR_EMULATED
#include "emulated_hopper.h"
#include "routing_hopper.cuh"

namespace {
std::string message;
}

extern "C" int emulated_stages(int64_t layers, int64_t channels) { return sr::stages_that_fit(layers, channels); }

// Arguments as in sr::Arguments, the rows as a pointer to them. Null, or what is wrong.
extern "C" const char* emulated_route(const void* const* rows, int64_t stride, const float* weights,
                                      const int32_t* bounds, float* mean, float* rstd, void* out, float* squares,
                                      int64_t tokens, int layers, int blocks, int channels, int samples, int stages,
                                      int given, int clusters, unsigned seed) {
  static_assert(32 * sr::WARPS == sr::machine::THREADS);
  sr::Arguments a{{},     stride, weights, bounds,   mean,    rstd,   out, squares, tokens, 2 * tokens * channels,
                  layers, blocks, channels, samples, stages, given != 0};
  std::copy(rows, rows + layers, a.rows);
  const size_t shared = sr::HEAD_BYTES + stages * sr::stage_bytes(layers, channels);
  message = sr::with_kernel(layers, blocks, [&](auto* kernel) {
    for (int i = 0; i < clusters; ++i)
      if (auto error = sr::machine::run_cluster(i, clusters, shared, seed, [&] { kernel(a); }); !error.empty())
        return error;
    return std::string();
  });
  return message.empty() ? nullptr : message.c_str();
}
