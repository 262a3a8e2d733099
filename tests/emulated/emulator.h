// Runs CUDA device code on a CPU, as it is: what nvcc knows by itself, for g++ -include.
//
// The threads of a block are fibers of one thread of the system, which has the block's __shared__
// memory as thread_local. A fiber runs until it meets others: at __syncthreads, or at an exchange
// within its warp. Several blocks run at a time, in a random order; so a block that waits for
// another's results really waits. A launch fails, and says why, where threads of a warp or block do
// not arrive at the same place, where all wait for ever, and where memory is touched that is not
// there or not aligned (build with -fsanitize=alignment,... and let arrays end at a page without
// access).
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

namespace emulator {

struct Index {
  unsigned x, y = 0, z = 0;
};

Index thread_index();
Index block_index();
Index grid();
Index block();

void meet_block(int line);
void sleep();

// Each lane gives its bytes and gets those of all 32 lanes of its warp.
const char* exchange(const void* bytes, size_t size, int kind, int line);
constexpr size_t kMost = 16;  // bytes of a lane

template <class T>
__attribute__((no_sanitize("thread"))) T from_lane(const char* all, int lane) {
  T x;
  std::memcpy(&x, all + lane * kMost, sizeof(T));
  return x;
}

// Runs blocks x threads of it, `workers` blocks at a time. Gives what went wrong, or "".
std::string launch(unsigned blocks, unsigned threads, int workers, unsigned seed,
                   const std::function<void()>& kernel);

// Memory that ends (or begins) where the next byte may not be touched; of 0xff.
void* guarded(size_t bytes, bool at_end);
void free_guarded(void* memory, size_t bytes, bool at_end);

}  // namespace emulator

// Beside the extension module, whose names these would be otherwise.
#define fastrl fastrl_emulated

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define gridDim (emulator::grid())
#define blockDim (emulator::block())

inline void __syncthreads(int line = __builtin_LINE()) { emulator::meet_block(line); }
inline void __nanosleep(unsigned) { emulator::sleep(); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

inline void __syncwarp(unsigned = ~0u, int line = __builtin_LINE()) {
  emulator::exchange(nullptr, 0, 0, line);
}

template <class T>
T __shfl_sync(unsigned, T x, int lane, int = 32, int line = __builtin_LINE()) {
  return emulator::from_lane<T>(emulator::exchange(&x, sizeof(T), 1, line), lane & 31);
}
template <class T>
T __shfl_up_sync(unsigned, T x, unsigned by, int = 32, int line = __builtin_LINE()) {
  const int own = emulator::thread_index().x % 32, lane = own - static_cast<int>(by);
  return emulator::from_lane<T>(emulator::exchange(&x, sizeof(T), 2, line), lane < 0 ? own : lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int by, int = 32, int line = __builtin_LINE()) {
  const int lane = (emulator::thread_index().x % 32) ^ by;
  return emulator::from_lane<T>(emulator::exchange(&x, sizeof(T), 4, line), lane);
}

inline unsigned __ballot_sync(unsigned, bool vote, int line = __builtin_LINE()) {
  const char* all = emulator::exchange(&vote, sizeof(vote), 3, line);
  unsigned lanes = 0;
  for (int i = 0; i < 32; ++i) lanes |= unsigned{emulator::from_lane<bool>(all, i)} << i;
  return lanes;
}
inline bool __any_sync(unsigned mask, bool vote, int line = __builtin_LINE()) {
  return __ballot_sync(mask, vote, line) != 0;
}
inline bool __all_sync(unsigned mask, bool vote, int line = __builtin_LINE()) {
  return __ballot_sync(mask, vote, line) == ~0u;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

template <class T>
T atomicAdd(T* at, T by) {
  return __atomic_fetch_add(at, by, __ATOMIC_RELAXED);
}
