// Routing on Hopper: LayerNorm statistics and the weighted sum over layers in one pass over hidden, bf16.
//
// out[d,t,:] = sum_l weights[b(t),d,l] * (hidden[l,t,:] - mean[l,t]) * rstd[l,t]
//
// A cluster of two blocks takes a token, each block half of the channels, which it holds for all layers in shared
// memory: read once from global memory by bulk copies, `stages` tokens deep. Each block takes the moments of its half
// rows and sends them to the other; then tensor cores multiply [channels x layers] . [layers x blocks]. Every sum has
// a fixed order. The derivation is in sr_kernels/routing/README.md.
#pragma once

#include <cstring>

#include "routing_hopper.h"
#ifndef SR_EMULATED  // tests/sr_kernels/emulated_hopper.h
#include "hopper_machine.cuh"
#endif

namespace sr {

constexpr int CHUNK = 64;     // channels a warp multiplies at a time: 8 in a row for each of 8 lanes
constexpr int WARPS = 12;     // 36 layers: three rows each; 20 chunks: five to each of the four schedulers
constexpr float EPS = 1e-5f;  // eq. 2's LayerNorm

// Shared memory: this, then `stages` times `layers` rows of half of the channels.
struct Shared {
  uint64_t full[MAX_STAGES];            // a stage's rows have come
  uint64_t met[2];                      // [token parity]: the other block's moments have come
  float2 moments[2][2][MAX_LAYERS];     // [token parity][block]: mean and sum of squared deviations of its half rows
  float2 stats[MAX_LAYERS];             // mean, rstd
  float squares[WARPS][MAX_BLOCKS];
};
static_assert(sizeof(Shared) <= HEAD_BYTES && HEAD_BYTES % 128 == 0);

__device__ __forceinline__ float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
__device__ __forceinline__ float low_bfloat(uint32_t pair) { return float_of(pair << 16); }
__device__ __forceinline__ float high_bfloat(uint32_t pair) { return float_of(pair & 0xffff0000u); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x += machine::shuffle_xor(x, mask);
  return x;
}

// Mean and sum of squared deviations of `count` bf16, a multiple of 8, by a warp; `over` is 1 / count. The deviations'
// own mean is added to the mean and taken from their squares, so that a constant row has the exact mean.
__device__ __forceinline__ float2 half_row_moments(const uint4* row, int count, float over, int lane) {
  float sum[4] = {};
  for (int i = lane; i < count / 8; i += 32) {
    const uint4 v = row[i];
    sum[0] += low_bfloat(v.x) + high_bfloat(v.x);
    sum[1] += low_bfloat(v.y) + high_bfloat(v.y);
    sum[2] += low_bfloat(v.z) + high_bfloat(v.z);
    sum[3] += low_bfloat(v.w) + high_bfloat(v.w);
  }
  const float middle = warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3])) * over;
  float rest[4] = {}, square[4] = {};
  for (int i = lane; i < count / 8; i += 32) {
    const uint4 v = row[i];
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float a = low_bfloat(words[j]) - middle, b = high_bfloat(words[j]) - middle;
      rest[j] += a + b;
      square[j] += a * a;
      square[j] += b * b;
    }
  }
  const float error = warp_sum((rest[0] + rest[1]) + (rest[2] + rest[3])) * over;
  const float squares = warp_sum((square[0] + square[1]) + (square[2] + square[3]));
  return {middle + error, fmaxf(squares - static_cast<float>(count) * error * error, 0.0f)};
}

// Mean and rstd of a row from the moments of its halves, `count` elements each.
__device__ __forceinline__ float2 combine(float2 first, float2 second, int count) {
  const float apart = second.x - first.x, size = static_cast<float>(count);
  const float squares = first.y + second.y + apart * apart * (0.5f * size);
  return {0.5f * first.x + 0.5f * second.x, 1.0f / sqrtf(squares / (2.0f * size) + EPS)};
}

// The layer that element e (0, 1) of step s has in this lane: row of b, column of a.
__device__ __forceinline__ int layer_of(int s, int lane, int e) { return 8 * s + 2 * (lane % 4) + e; }

// One sample's weights as the lane's part of b, over each block's largest: any size is in fp16's range, and uniform and
// one-hot weights are exact. STEPS: layers in eights. TILES: blocks in eights.
template <int STEPS, int TILES>
struct Weights {
  uint32_t b[STEPS][TILES];  // layers layer_of(s, lane, 0..1), block 8 * tile + lane / 4
  float scale[TILES][2];     // of blocks 8 * tile + 2 * (lane % 4) + 0..1, the lane's columns of the product

  __device__ __forceinline__ void load(const float* weights, int layers, int blocks, int lane) {
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const int d = 8 * n + lane / 4;
      float w[STEPS][2], largest = 0.0f;
#pragma unroll
      for (int s = 0; s < STEPS; ++s)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int l = layer_of(s, lane, e);
          w[s][e] = d < blocks && l < layers ? weights[d * layers + l] : 0.0f;
          largest = fmaxf(largest, fabsf(w[s][e]));
        }
      largest = fmaxf(largest, machine::shuffle_xor(largest, 1));
      largest = fmaxf(largest, machine::shuffle_xor(largest, 2));
      largest = fmaxf(largest, 0x1p-126f);  // its reciprocal is finite
      const float over = 1.0f / largest;
#pragma unroll
      for (int s = 0; s < STEPS; ++s) b[s][n] = machine::pack_half(w[s][0] * over, w[s][1] * over);
#pragma unroll
      for (int e = 0; e < 2; ++e) scale[n][e] = machine::shuffle(largest, 4 * (2 * (lane % 4) + e));
    }
  }
};

// A word of two channels from each of two layers, normalised: the first channel's pair of layers and the second's.
__device__ __forceinline__ uint2 normalized(uint32_t first, uint32_t second, float2 m, float2 n) {
  return {machine::pack_half((low_bfloat(first) - m.x) * m.y, (low_bfloat(second) - n.x) * n.y),
          machine::pack_half((high_bfloat(first) - m.x) * m.y, (high_bfloat(second) - n.x) * n.y)};
}

__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// 64 channels of all blocks by one warp. Lane 4g + t reads 8 channels in a row, 8g.., of its layers: channels 8g + 2i
// and 8g + 2i + 1 are rows g and g + 8 of tile i, so that it ends with 8 channels in a row of its blocks. Of 8 lanes
// that read together (t = 0..3, two g) the 16-byte words fall at 32t + 16g modulo 128: all banks, none twice.
template <int STEPS, int TILES>
__device__ __forceinline__ void product(float (&acc)[4][TILES][4], const unsigned char* rows, int pitch, int layers,
                                        const float2 (&stats)[STEPS][2], const Weights<STEPS, TILES>& w, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][n][e] = 0.0f;
  const unsigned char* at = rows + lane / 4 * 16;
#pragma unroll
  for (int s = 0; s < STEPS; s += 2) {
    const bool pair = s + 1 < STEPS;  // known when unrolled; else an eight of layers is left
    uint4 v[2][2];
#pragma unroll
    for (int h = 0; h < (pair ? 2 : 1); ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // past the last layer any row will do: its rstd is zero
        int l = layer_of(s + h, lane, e);
        if (s + h == STEPS - 1) l = l < layers ? l : layers - 1;
        v[h][e] = *reinterpret_cast<const uint4*>(at + l * pitch);
      }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint2 a = normalized(word(v[0][0], i), word(v[0][1], i), stats[s][0], stats[s][1]);
      if (pair) {
        const int next = s + 1 < STEPS ? s + 1 : s;
        const uint2 c = normalized(word(v[1][0], i), word(v[1][1], i), stats[next][0], stats[next][1]);
#pragma unroll
        for (int n = 0; n < TILES; ++n) machine::multiply_16(acc[i][n], a.x, a.y, c.x, c.y, w.b[s][n], w.b[next][n]);
      } else {
#pragma unroll
        for (int n = 0; n < TILES; ++n) machine::multiply_8(acc[i][n], a.x, a.y, w.b[s][n]);
      }
    }
  }
}

// Start the copies of a token's rows, by one warp.
__device__ __forceinline__ void fetch(const Arguments& a, unsigned char* stage, uint64_t* full, int64_t token, int rank,
                                      int lane) {
  const int bytes = a.channels;  // half a row of bf16
  if (lane == 0) machine::barrier_expect(full, a.layers * bytes);
  machine::sync_warp();
  for (int l = lane; l < a.layers; l += 32)
    machine::bulk_load(stage + l * (bytes + PAD_BYTES),
                       static_cast<const unsigned char*>(a.rows[l]) + token * a.stride * 2 + rank * bytes, bytes, full);
}

template <int STEPS, int TILES>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(32 * WARPS, 1)
    route_kernel(const __grid_constant__ Arguments a) {
  auto* shared = reinterpret_cast<Shared*>(machine::shared_memory());
  unsigned char* stages = machine::shared_memory() + HEAD_BYTES;
  const int thread = machine::thread_index(), warp = thread / 32, lane = thread % 32;
  const int rank = machine::block_index() % 2, half = a.channels / 2, pitch = a.channels + PAD_BYTES;
  const int64_t first = machine::block_index() / 2, step = machine::block_count() / 2;
  const int stage_size = a.layers * pitch;
  const float over = 1.0f / static_cast<float>(half);

  if (thread == 0) {
    for (int s = 0; s < MAX_STAGES; ++s) machine::barrier_init(&shared->full[s]);
    for (int s = 0; s < 2; ++s) machine::barrier_init(&shared->met[s]);
    machine::barriers_made();
  }
  if (thread < MAX_LAYERS) shared->stats[thread] = {0.0f, 0.0f};  // past the last layer they stay so
  machine::sync_cluster();  // both blocks run, and their barriers are there
  if (warp == WARPS - 1)
    for (int s = 0; s < a.stages; ++s)
      if (first + s * step < a.tokens)
        fetch(a, stages + s * stage_size, &shared->full[s], first + s * step, rank, lane);

  Weights<STEPS, TILES> w;
  int sample = 0, loaded = -1, stage = 0;
  uint32_t parity = 0, turn = 0, phase = 0;
  for (int64_t token = first; token < a.tokens; token += step) {
    if (a.bounds)  // whatever the bounds are, no sample past the last is read
      while (sample + 1 < a.samples && token >= a.bounds[sample + 1]) ++sample;
    if (sample != loaded) {
      w.load(a.weights + static_cast<int64_t>(sample) * a.blocks * a.layers, a.layers, a.blocks, lane);
      loaded = sample;
    }
    const unsigned char* rows = stages + stage * stage_size;
    if (a.given && thread < a.layers) {
      const int64_t at = thread * a.tokens + token;
      shared->stats[thread] = {a.mean[at], a.rstd[at]};
    }
    if (!a.given && thread == 0) machine::barrier_expect(&shared->met[turn], a.layers * sizeof(float2));

    machine::barrier_wait(&shared->full[stage], parity);
    if (!a.given) {
      for (int l = warp; l < a.layers; l += WARPS) {
        const float2 moments = half_row_moments(reinterpret_cast<const uint4*>(rows + l * pitch), half, over, lane);
        if (lane == 0) shared->moments[turn][rank][l] = moments;
        if (lane == 1) machine::send_peer(&shared->moments[turn][rank][l], moments, &shared->met[turn], 1 - rank);
      }
      machine::barrier_wait_peer(&shared->met[turn], phase);
      machine::sync_warp();
      if (const int l = warp + lane * WARPS; l < a.layers) {  // a warp ends the rows that it began
        const float2 stats = combine(shared->moments[turn][0][l], shared->moments[turn][1][l], half);
        shared->stats[l] = stats;
        if (rank == 0) {
          a.mean[l * a.tokens + token] = stats.x;
          a.rstd[l * a.tokens + token] = stats.y;
        }
      }
      // The other block may send the next token's moments while these are read, but not those of the one after, which
      // wait for ours of the next.
      turn ^= 1;
      if (turn == 0) phase ^= 1;
    }
    machine::sync_block();

    float2 stats[STEPS][2];
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
      for (int e = 0; e < 2; ++e) stats[s][e] = shared->stats[layer_of(s, lane, e)];
    unsigned char* out = static_cast<unsigned char*>(a.out) + lane % 4 * 2 * a.plane +
                         2 * (token * a.channels + rank * half + lane / 4 * 8);  // of the lane's first block
    float squares[TILES][2] = {};
    for (int chunk = warp; chunk < half / CHUNK; chunk += WARPS) {
      unsigned char* to = out + chunk * (2 * CHUNK);
      float acc[4][TILES][4];
      product<STEPS, TILES>(acc, rows + chunk * (2 * CHUNK), pitch, a.layers, stats, w, lane);
#pragma unroll
      for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int d = 8 * n + 2 * (lane % 4) + e;
          uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float x = acc[i][n][e] * w.scale[n][e], y = acc[i][n][e + 2] * w.scale[n][e];
            squares[n][e] += x * x + y * y;
            words[i] = machine::pack_bfloat(x, y);
          }
          if (d < a.blocks)
            machine::store_streaming(to, {words[0], words[1], words[2], words[3]});
          to += e == 0 ? a.plane : 7 * a.plane;  // blocks 2t, 2t + 1, 2t + 8, ...
        }
    }
    if (a.squares) {
#pragma unroll
      for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float x = squares[n][e];
#pragma unroll
          for (int mask = 4; mask < 32; mask *= 2) x += machine::shuffle_xor(x, mask);
          if (lane < 4) shared->squares[warp][8 * n + 2 * lane + e] = x;
        }
    }
    machine::sync_block();  // every warp has done with the stage
    if (warp == WARPS - 1 && token + a.stages * step < a.tokens)
      fetch(a, stages + stage * stage_size, &shared->full[stage], token + a.stages * step, rank, lane);
    if (a.squares && thread < a.blocks) {
      float x = 0.0f;
      for (int i = 0; i < WARPS; ++i) x += shared->squares[i][thread];
      a.squares[(static_cast<int64_t>(rank) * a.blocks + thread) * a.tokens + token] = x;
    }
    if (++stage == a.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

// The kernel's instance for these sizes, given to `use`.
template <int STEPS, class Use>
auto with_blocks(int blocks, Use use) {
  return blocks <= 8 ? use(route_kernel<STEPS, 1>) : use(route_kernel<STEPS, 3>);
}
template <class Use>
auto with_kernel(int layers, int blocks, Use use) {
  switch ((layers + 7) / 8) {
    case 1: return with_blocks<1>(blocks, use);
    case 2: return with_blocks<2>(blocks, use);
    case 3: return with_blocks<3>(blocks, use);
    case 4: return with_blocks<4>(blocks, use);
    case 5: return with_blocks<5>(blocks, use);
    default: return with_blocks<6>(blocks, use);
  }
}

}  // namespace sr
