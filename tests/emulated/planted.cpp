// Kernels with a fault each, which the emulator has to find.
#include "emulator.h"

namespace {

__global__ void leaves_its_warp(float* x) {
  if (threadIdx.x % 32 == 7) return;
  x[threadIdx.x] = __shfl_up_sync(~0u, x[threadIdx.x], 1);
}

__global__ void parts_within_a_warp(float* x) {
  if (threadIdx.x % 2) {
    x[threadIdx.x] = __shfl_up_sync(~0u, x[threadIdx.x], 1);
  } else {
    x[threadIdx.x] = __shfl_up_sync(~0u, x[threadIdx.x], 2);
  }
}

__global__ void parts_within_a_block(float* x) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  x[threadIdx.x] = 1;
}

__global__ void forgets_the_barrier(float* x) {
  if (threadIdx.x >= 32) __syncthreads();
  x[threadIdx.x] = 1;
}

__global__ void reads_behind_the_end(float* x) { x[threadIdx.x] += x[threadIdx.x + 1]; }

__global__ void reads_in_front(float* x) { x[threadIdx.x] += x[int(threadIdx.x) - 1]; }

struct alignas(16) Vector {
  float entry[4];
};
__global__ void reads_unaligned(float* x) {
  const Vector v = *reinterpret_cast<const Vector*>(x + threadIdx.x % 4);
  x[0] = v.entry[threadIdx.x % 4];
}

__global__ void waits_for_ever(float* x) {
  while (*static_cast<volatile float*>(x) != 3) __nanosleep(20);
}

// Of two blocks the first waits for the second: nothing says that they run at the same time.
__global__ void waits_for_a_later_block(float* x, unsigned* taken) {
  __shared__ unsigned own;
  if (threadIdx.x == 0) own = atomicAdd(taken, 1u);
  __syncthreads();
  volatile float* flag = x;
  if (own == 1 && threadIdx.x == 0) *flag = 3;
  while (own == 0 && *flag != 3) __nanosleep(20);
}

// The sum of a number from each warp, which is 2 unless the second comes too late.
__global__ void wants_a_barrier(float* x) {
  __shared__ float own[2];
  __syncwarp();
  if (threadIdx.x % 32 == 0) own[threadIdx.x / 32] = 0;
  __syncthreads();
  __syncwarp();
  own[threadIdx.x / 32] = 1;
  __syncwarp();
  x[threadIdx.x] = own[0] + own[1];
}

// Right in every order that the emulator tries. Shuffles meet, but order no memory.
__global__ void takes_a_shuffle_for_a_barrier(float* x) {
  __shared__ float own[64];
  own[threadIdx.x] = threadIdx.x;
  __shfl_xor_sync(~0u, 0.0f, 1);
  x[threadIdx.x] = own[threadIdx.x ^ 1];
}

__global__ void writes_where_other_blocks_write(float* x) { x[threadIdx.x] = 1; }

// Each as it should be.
__global__ void waits_for_an_earlier_block(float* x, unsigned* taken) {
  __shared__ unsigned own;
  if (threadIdx.x == 0) own = atomicAdd(taken, 1u);
  __syncthreads();
  volatile float* flag = x;
  if (own == 0 && threadIdx.x == 0) *flag = 3;
  while (own == 1 && *flag != 3) __nanosleep(20);
}

__global__ void sums(float* x) {
  __shared__ float total[2];
  float own = threadIdx.x;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const float below = __shfl_up_sync(~0u, own, lanes);
    if (threadIdx.x % 32 >= static_cast<unsigned>(lanes)) own += below;
  }
  if (threadIdx.x % 32 == 31) total[threadIdx.x / 32] = own;
  __syncthreads();
  x[threadIdx.x] = threadIdx.x < 32 ? own : own + total[0];
}

}  // namespace

// What the emulator says of the kernel of this number, over 64 floats of which `sum` is one.
extern "C" __attribute__((visibility("default"))) const char* run(int kernel, int workers,
                                                                  unsigned seed, float* sum) {
  static std::string said;
  const size_t bytes = 64 * sizeof(float);
  float* x = static_cast<float*>(emulator::guarded(bytes, kernel != 5));
  for (int i = 0; i < 64; ++i) x[i] = 0;
  unsigned taken = 0;
  const std::function<void()> kernels[] = {
      [&] { leaves_its_warp(x); },
      [&] { parts_within_a_warp(x); },
      [&] { parts_within_a_block(x); },
      [&] { forgets_the_barrier(x); },
      [&] { reads_behind_the_end(x); },
      [&] { reads_in_front(x); },
      [&] { reads_unaligned(x); },
      [&] { waits_for_ever(x); },
      [&] { waits_for_a_later_block(x, &taken); },
      [&] { waits_for_an_earlier_block(x, &taken); },
      [&] { sums(x); },
      [&] { wants_a_barrier(x); },
      [&] { takes_a_shuffle_for_a_barrier(x); },
      [&] { writes_where_other_blocks_write(x); },
  };
  const unsigned blocks = kernel == 8 || kernel == 9 || kernel == 13 ? 2 : 1;
  said = emulator::launch(blocks, 64, workers, seed, kernels[kernel]);
  *sum = kernel == 11 ? x[0] : x[63];
  emulator::free_guarded(x, bytes, kernel != 5);
  return said.c_str();
}
