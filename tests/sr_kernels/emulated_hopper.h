// csrc/hopper_machine.cuh in plain C++: a cluster's 2 x 384 threads as fibers of one thread of the CPU.
//
// The order of the fibers and the time at which asynchronous copies land are drawn from a seed (0: the plain order), and
// one block starts long before the other. Shared memory and the targets of copies under way hold NaN, so that what is
// read too early, or after it was given back, is seen. Collective calls (shuffles, tensor cores) check that all lanes of
// the warp come, and to the same one.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __cluster_dims__(...)
#define __launch_bounds__(...)

struct float2 { float x, y; };
struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };

namespace sr::machine {

constexpr int THREADS = 384, STACK = 64 << 10, GUARD = 4096;

struct Collective {  // of the lanes of a warp; two sets of slots, since one lane may be a call ahead of another
  const char* name = nullptr;
  int arrived = 0;
  uint64_t done = 0;
  uint32_t slots[2][32][10];
  float product[2][16][8];
};
struct Meeting {
  int arrived = 0;
  uint64_t done = 0;
};
struct Barrier {
  int64_t bytes = 0;
  int arrivals = 0;
  uint64_t phase = 0;
};
struct Copy {  // to a block's shared memory, from global memory or (the other block's) registers
  unsigned char* to;
  const unsigned char* from;
  uint32_t bytes;
  uint64_t* barrier;
  std::array<unsigned char, 8> sent;
};
struct Block {
  std::vector<unsigned char> memory;
  unsigned char* base = nullptr;
  Collective warps[THREADS / 32];
  Meeting meeting;
};
struct Fiber {
  ucontext_t context;
  int block = 0, thread = 0;
  bool finished = false;
  const uint64_t* awaited = nullptr;  // it does not run again until this differs from `seen`
  uint64_t seen = 0;
  std::vector<char> stack;
};

struct Cluster {
  Block blocks[2];
  Meeting meeting;
  std::map<uint64_t*, Barrier> barriers;
  std::vector<Copy> copies;
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::string error;
  uint64_t progress = 0;
  int64_t index = 0, count = 0;
  size_t shared = 0;
};
inline Cluster* cluster = nullptr;

[[noreturn]] inline void leave() {
  cluster->running->finished = true;
  setcontext(&cluster->scheduler);
  std::abort();
}
inline void require(bool good, const char* what) {
  if (good) return;
  if (cluster->error.empty()) cluster->error = what;
  leave();  // no exception may pass a fiber's end
}
inline void wait_while(const uint64_t& counter, uint64_t seen) {
  if (counter == seen) {
    cluster->running->awaited = &counter, cluster->running->seen = seen;
    swapcontext(&cluster->running->context, &cluster->scheduler);
    if (!cluster->error.empty()) leave();
  }
  ++cluster->progress;
}

inline int thread_index() { return cluster->running->thread; }
inline int lane() { return thread_index() % 32; }
inline int64_t block_index() { return 2 * cluster->index + cluster->running->block; }
inline int64_t block_count() { return 2 * cluster->count; }
inline Block& block() { return cluster->blocks[cluster->running->block]; }
inline unsigned char* shared_memory() { return block().base; }
inline size_t shared_offset(const void* p) {
  const size_t offset = static_cast<const unsigned char*>(p) - block().base;
  require(offset < cluster->shared, "an address outside shared memory");
  return offset;
}

inline void meet(Meeting& meeting, int threads) {
  const uint64_t mine = meeting.done;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.done;
  }
  wait_while(meeting.done, mine);
}
inline void sync_block() { meet(block().meeting, THREADS); }
inline void sync_cluster() { meet(cluster->meeting, 2 * THREADS); }

// Leave `count` words in this lane's slots; returns which set, once all lanes have come.
template <class Last>
int gather(const char* name, const uint32_t* words, int count, Last last) {
  Collective& c = block().warps[thread_index() / 32];
  const uint64_t mine = c.done;
  const int set = mine % 2;
  require(c.arrived == 0 || std::strcmp(c.name, name) == 0, "lanes of a warp at different collective calls");
  c.name = name;
  std::memcpy(c.slots[set][lane()], words, count * 4);
  if (++c.arrived == 32) {
    last(c, set);
    c.arrived = 0;
    ++c.done;
  }
  wait_while(c.done, mine);
  return set;
}
inline void sync_warp() {
  gather("sync", nullptr, 0, [](Collective&, int) {});
}
inline float shuffle(float x, int from) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const int set = gather("shuffle", &bits, 1, [](Collective&, int) {});
  std::memcpy(&x, block().warps[thread_index() / 32].slots[set][from], 4);
  return x;
}
inline float shuffle_xor(float x, int mask) { return shuffle(x, lane() ^ mask); }

inline void barrier_init(uint64_t* barrier) {
  shared_offset(barrier);
  cluster->barriers[barrier] = {0, 1, 0};
}
inline void barriers_made() {}
inline void complete(Barrier& b) {
  if (b.arrivals || b.bytes) return;
  b.arrivals = 1;
  ++b.phase;
}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  Barrier& b = cluster->barriers.at(barrier);
  require(b.arrivals == 1 && bytes < 1 << 20, "one arrival a phase, of less than 2^20 bytes");
  b.bytes += bytes;
  b.arrivals = 0;
  complete(b);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const Barrier& b = cluster->barriers.at(barrier);
  if (b.phase % 2 == parity) wait_while(b.phase, b.phase);
}
inline void barrier_wait_peer(uint64_t* barrier, uint32_t parity) { barrier_wait(barrier, parity); }
inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  require((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16 == 0,
          "a bulk copy at multiples of 16 bytes");
  require(shared_offset(to) + bytes <= cluster->shared, "a bulk copy inside shared memory");
  std::memset(to, 0xff, bytes);
  auto* place = static_cast<unsigned char*>(to);
  cluster->copies.push_back({place, static_cast<const unsigned char*>(from), bytes, barrier, {}});
}
inline void send_peer(float2* place, float2 value, uint64_t* barrier, int peer) {
  require(peer == 1 - cluster->running->block, "the other block");
  const auto there = [&](const void* p) { return cluster->blocks[peer].base + shared_offset(p); };
  Copy copy{there(place), nullptr, 8, reinterpret_cast<uint64_t*>(there(barrier)), {}};
  require(cluster->barriers.count(copy.barrier), "the other block has not started");
  std::memcpy(copy.sent.data(), &value, 8);
  std::memset(copy.to, 0xff, 8);
  cluster->copies.push_back(copy);
}

inline void store_streaming(void* to, uint4 value) {
  require(reinterpret_cast<uintptr_t>(to) % 16 == 0, "a store at a multiple of 16 bytes");
  std::memcpy(to, &value, 16);
}

inline uint32_t pack_half(float low, float high) {
  const _Float16 pair[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t packed;
  std::memcpy(&packed, pair, 4);
  return packed;
}
inline uint32_t bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack_bfloat(float low, float high) { return bfloat(low) | bfloat(high) << 16; }

inline float half_of(uint32_t packed, int i) {
  _Float16 pair[2];
  std::memcpy(pair, &packed, 4);
  return static_cast<float>(pair[i]);
}
inline float toward_zero(double x) {
  const float y = static_cast<float>(x);
  return std::isfinite(y) && std::fabs(static_cast<double>(y)) > std::fabs(x) ? std::nextafter(y, 0.0f) : y;
}

// d [16 x 8] = a [16 x DEPTH] . b [DEPTH x 8] + c, the sum truncated as tensor cores do. Where an element lies is the
// text of the PTX ISA, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8" of type .f16, written out for element i.
template <int DEPTH>
void multiply(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  constexpr int A = DEPTH / 4, B = DEPTH / 8;  // registers of two elements
  uint32_t words[10];
  std::memcpy(words, a, A * 4);
  std::memcpy(words + A, b, B * 4);
  std::memcpy(words + A + B, c, 16);
  const auto product = [](Collective& all, int set) {
    float left[16][DEPTH], right[DEPTH][8], sum[16][8];
    for (int l = 0; l < 32; ++l) {
      const int group = l >> 2, in_group = l % 4;
      const uint32_t* slot = all.slots[set][l];
      for (int i = 0; i < 2 * A; ++i) {
        const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
        left[row][in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)] = half_of(slot[i / 2], i % 2);
      }
      for (int i = 0; i < 2 * B; ++i)
        right[in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = half_of(slot[A + i / 2], i % 2);
      for (int i = 0; i < 4; ++i)
        std::memcpy(&sum[i < 2 ? group : group + 8][in_group * 2 + (i & 1)], slot + A + B + i, 4);
    }
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n) {
        double x = sum[m][n];
        for (int k = 0; k < DEPTH; ++k) x += static_cast<double>(left[m][k]) * right[k][n];
        all.product[set][m][n] = toward_zero(x);
      }
  };
  const int set = gather(DEPTH == 16 ? "m16n8k16" : "m16n8k8", words, A + B + 4, product);
  const auto& d = block().warps[thread_index() / 32].product[set];
  for (int i = 0; i < 4; ++i) c[i] = d[i < 2 ? lane() >> 2 : (lane() >> 2) + 8][lane() % 4 * 2 + (i & 1)];
}
inline void multiply_16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
  multiply<16>(c, a, b);
}
inline void multiply_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  const uint32_t a[] = {a0, a1};
  multiply<8>(c, a, &b0);
}

inline void land(size_t i) {
  const Copy copy = cluster->copies[i];
  cluster->copies.erase(cluster->copies.begin() + i);
  std::memcpy(copy.to, copy.from ? copy.from : copy.sent.data(), copy.bytes);
  Barrier& b = cluster->barriers.at(copy.barrier);
  b.bytes -= copy.bytes;
  complete(b);
  ++cluster->progress;
}

inline void enter() {
  cluster->kernel();
  ++cluster->progress;
  leave();
}

// Run `kernel` as cluster `index` of `count` with `shared` bytes of shared memory a block; empty, or what is wrong.
inline std::string run_cluster(int64_t index, int64_t count, size_t shared, unsigned seed,
                               std::function<void()> kernel) {
  Cluster mine;
  cluster = &mine;
  mine.index = index, mine.count = count, mine.shared = shared, mine.kernel = std::move(kernel);
  for (Block& b : mine.blocks) {
    b.memory.assign(shared + GUARD, 0xff);
    b.base = b.memory.data() + (128 - reinterpret_cast<uintptr_t>(b.memory.data()) % 128);
  }
  mine.fibers.resize(2 * THREADS);
  std::vector<Fiber*> order;
  for (int i = 0; i < 2 * THREADS; ++i) {
    Fiber& f = mine.fibers[i];
    f.block = i / THREADS, f.thread = i % THREADS, f.stack.resize(STACK);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = STACK;
    makecontext(&f.context, enter, 0);
    order.push_back(&f);
  }
  std::mt19937 random(seed);
  bool late = seed != 0;  // one block starts when the other has nothing left to do
  for (bool alive = true; alive && mine.error.empty();) {
    alive = false;
    const uint64_t before = mine.progress;
    if (seed) std::shuffle(order.begin(), order.end(), random);
    for (Fiber* f : order) {
      alive |= !f->finished;
      if (f->finished || (late && f->block == static_cast<int>(seed % 2)) || (f->awaited && *f->awaited == f->seen)) continue;
      mine.running = f;
      swapcontext(&mine.scheduler, &f->context);
      if (!mine.error.empty()) break;
    }
    const bool stuck = alive && mine.progress == before;
    if (!mine.copies.empty() && (stuck || random() % 4 == 0)) land(random() % mine.copies.size());
    else if (stuck && late) late = false;
    else if (stuck && mine.error.empty()) mine.error = "deadlock";
  }
  if (mine.error.empty() && !mine.copies.empty()) mine.error = "copies under way at the end";
  for (const Block& b : mine.blocks)
    for (size_t i = shared; i < shared + GUARD - 256; ++i)
      if (b.base[i] != 0xff && mine.error.empty()) mine.error = "a write past the end of shared memory";
  cluster = nullptr;
  return mine.error;
}

}  // namespace sr::machine
