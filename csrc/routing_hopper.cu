// The launch of routing_hopper.cuh, apart from torch's headers, so that nvcc takes seconds.

#include "routing_hopper.cuh"

namespace sr {

const char* hopper_route(const Arguments& a, int multiprocessors, void* stream) {
  const auto bytes = static_cast<int>(HEAD_BYTES + a.stages * stage_bytes(a.layers, a.channels));
  const int64_t clusters = a.tokens < multiprocessors / 2 ? a.tokens : multiprocessors / 2;
  const auto error = with_kernel(a.layers, a.blocks, [&](auto* kernel) {
    if (const auto bad = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return bad;
    kernel<<<static_cast<unsigned>(2 * clusters), 32 * WARPS, bytes, static_cast<cudaStream_t>(stream)>>>(a);
    return cudaGetLastError();
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace sr
