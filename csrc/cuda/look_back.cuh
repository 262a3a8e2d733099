// How the chunks of a long row, each scanned by a block of its own, learn of what comes before
// them.
//
// A block publishes what its chunk makes of x before it knows that x, and then composes what the
// chunks before it have published, 256 at most: every 256th chunk publishes its own x as well. The
// order of composition depends on the chunk's place in the row alone.
#pragma once

#include "schedule.cuh"

namespace fastrl::cuda {

// A double that another block writes, once. It is there when its bits are no longer all ones, as
// they are when the kernel starts: no flag, and no fence between that and the number.
class Published {
 public:
  FASTRL_DEVICE void set(double x) {
    *static_cast<volatile double*>(&x_) = x == x ? x : nan("");  // never the NaN of all ones
  }
  FASTRL_DEVICE bool get(double& x) const {
    x = *static_cast<const volatile double*>(&x_);
    uint64_t bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    return ~bits != 0;
  }

 private:
  double x_;
};

// Of a call: an entry a window, and a counter from which blocks take their windows. All bits are
// set when the kernel starts.
struct Slots {
  struct Chunk {
    Published a, b, before;
  };
  unsigned long long* taken;
  Chunk* chunks;

  __host__ FASTRL_DEVICE explicit operator bool() const { return chunks != nullptr; }
};

// What a thread waits for has been taken by a running block, unless cu_seqlens does not rise; then
// it gives up after some seconds.
constexpr int kPatience = 1 << 24;

FASTRL_DEVICE double wait_for(const Published& number) {
  double x;
  for (int patience = kPatience; !number.get(x) && patience > 0; --patience) __nanosleep(20);
  return x;  // what was waited for in vain is NaN
}

// x before `chunk` >= 1 of a row. Chunk i has the slot `slot` + kStep * (chunk - i), and each
// thread of the block one of these chunks.
template <int kStep>
FASTRL_DEVICE double look_back(const Slots& slots, Shared& shared, int64_t slot, int64_t chunk) {
  const int64_t first = (chunk - 1) / kThreads * kThreads, own = first + threadIdx.x;
  Affine all = Affine::identity();
  if (own < chunk) {
    const Slots::Chunk& other = slots.chunks[slot + kStep * (chunk - own)];
    all = {wait_for(other.a), wait_for(other.b)};
  }
  __syncwarp();
  all = compose_lanes(all, lane_of_thread());
  if (lane_of_thread() == kLanes - 1) shared.spans[threadIdx.x / kLanes] = all;
  if (threadIdx.x == 0) {
    shared.before = first > 0 ? wait_for(slots.chunks[slot + kStep * (chunk - first)].before) : 0.0;
  }
  __syncthreads();
  double x = shared.before;
#pragma unroll 1
  for (int i = 0; first + i * kLanes < chunk; ++i) x = shared.spans[i](x);
  return x;
}

}  // namespace fastrl::cuda
