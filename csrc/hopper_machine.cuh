// What the Hopper kernel asks of the machine, one PTX instruction a function. tests/sr_kernels/emulated_hopper.h has
// the same functions in plain C++, so that a CPU can run the kernel.
#pragma once

#include <cstdint>

namespace sr::machine {

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }
__device__ __forceinline__ int64_t block_count() { return gridDim.x; }

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

// Every thread of both blocks arrives and waits.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// A barrier in shared memory that one thread arrives at and that counts the bytes that come asynchronously.
__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// Barriers just made are seen by the copy engine and by the other block.
__device__ __forceinline__ void barriers_made() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

#define SR_BARRIER_WAIT(ACQUIRE)                                                                      \
  asm volatile(                                                                                       \
      "{\n"                                                                                           \
      ".reg .pred done;\n"                                                                            \
      "again: mbarrier.try_wait.parity.acquire." ACQUIRE ".shared::cta.b64 done, [%0], %1;\n"          \
      "@!done bra again;\n"                                                                           \
      "}" ::"r"(shared_address(barrier)), "r"(parity)                                                  \
      : "memory")

// Wait until the barrier's phase of this parity is complete; what the copy engine brought is seen after.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) { SR_BARRIER_WAIT("cta"); }
// The same where the other block sent it.
__device__ __forceinline__ void barrier_wait_peer(uint64_t* barrier, uint32_t parity) { SR_BARRIER_WAIT("cluster"); }

// Write two floats to the same place of the other block's shared memory; they count as 8 bytes at its barrier.
__device__ __forceinline__ void send_peer(float2* place, float2 value, uint64_t* barrier, int peer) {
  asm volatile(
      "{\n"
      ".reg .b32 place, barrier;\n"
      "mapa.shared::cluster.u32 place, %0, %4;\n"
      "mapa.shared::cluster.u32 barrier, %1, %4;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [place], {%2, %3}, [barrier];\n"
      "}" ::"r"(shared_address(place)), "r"(shared_address(barrier)), "f"(value.x), "f"(value.y), "r"(peer)
      : "memory");
}

// Start copying `bytes` from global to shared memory, both at multiples of 16; they count at the barrier.
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// 16 bytes to global memory that nobody reads soon.
__device__ __forceinline__ void store_streaming(void* to, uint4 value) { __stcs(static_cast<uint4*>(to), value); }

// Two floats rounded to nearest, the first in the lower half.
__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ uint32_t pack_bfloat(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// c [16 x 8] += a [16 x 16] . b [16 x 8], fp16 in, fp32 out. PTX ISA, "Matrix Fragments for mma.m16n8k16", with
// g = lane / 4, t = lane % 4: a0 (row g, columns 2t 2t+1), a1 (row g+8, same), a2 and a3 as those, columns + 8;
// b0 (rows 2t 2t+1, column g), b1 rows + 8; c (row g, columns 2t 2t+1), then row g+8.
__device__ __forceinline__ void multiply_16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                            uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same with 8 columns of a and rows of b: a0, a1 and b0 alone.
__device__ __forceinline__ void multiply_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

}  // namespace sr::machine
