// The returns' recursions x_t = b_t + a_t x_{t+1}, and their transposed, on a GPU: one kernel.
//
// An estimator (estimators.h) forms (a, b) of each step. They compose to what many steps make of x:
// the eight of a thread, in turn; those of a warp's tile, by shuffles; the tiles of a chunk of
// 2048, in turn; the chunks of a row by look_back.cuh. So the order of all operations on a row
// follows from its own length, dense or packed, and its results do not depend on its batch, its
// address or the schedule. Each input is read once and each output written once; what a block waits
// for, while its steps stay in registers, was taken by a block that had started before.
//
// gae in float with next_values and terminated moves 21 bytes a step, and one multiprocessor of an
// H200 copies 18 bytes a cycle: 1.1 cycles a step, or 145 instructions of a thread. The kernel
// takes about 120 where rows are whole multiples of 8 steps, 15 of them in double, 3 conversions
// and 5 shuffles; and 24 warps of 256 steps, 13 bytes each, have 80 KB under way, some four times
// what covers the latency of memory. So instructions and bytes weigh about the same: what is formed
// twice costs less than the registers that would hold it, which are loads not under way.
#pragma once

#include "look_back.cuh"

namespace fastrl::cuda {

// Blocks that wait for others take their windows in the order of the scan, in which they started.
template <bool kForwardInTime>
FASTRL_DEVICE void take_window(const Slots& slots, Shared& shared) {
  if (threadIdx.x == 0) {
    const int64_t taken =
        slots ? static_cast<int64_t>(atomicAdd(slots.taken, 1ull) + 1) : blockIdx.x;
    shared.window = kForwardInTime ? taken : gridDim.x - 1 - taken;
  }
  __syncthreads();
}

// The action of the row that follows on the tile in time, or -1. Asked of longer rows, before the
// inputs fill the registers. Only tiles with an action look: each gap is searched once.
FASTRL_DEVICE int64_t action_behind(const Flags& mask, const Place& p) {
  const int64_t end = p.length - p.first;  // of the thread's steps, in time
  bool acts = !mask;
  if (mask) {
#pragma unroll 1
    for (int64_t t = larger(0, end - kSteps); t < end; ++t) acts |= *mask.at(p.index, t) != 0;
  }
  if (!__any_sync(kAllLanes, acts)) return -1;
  const int64_t t = action_from<1>(mask, p.index, end + kSteps * p.before, p.length);
  return t < p.length ? t : -1;
}

// What is in front of the block's chunk of a longer row; and what the chunks behind it wait for.
template <bool kForwardInTime>
FASTRL_DEVICE double chain(const Slots& slots, Shared& shared) {
  const int64_t chunk = shared.chained.chunk;
  const bool is_last = (chunk + 1) * kChunk >= shared.chained.length;
  Slots::Chunk& own = slots.chunks[shared.window];
  if (!is_last && threadIdx.x < kLanes) {
    const int tile = threadIdx.x;
    Affine all = tile < kWarps ? shared.tiles[tile] : Affine::identity();
    all = compose_lanes(all, tile);
    if (tile == kLanes - 1) {
      own.a.set(all.a);
      own.b.set(all.b);
    }
  }
  if (chunk == 0) return 0.0;
  const double x = look_back<kForwardInTime ? -1 : 1>(slots, shared, shared.window, chunk);
  if (!is_last && chunk % kThreads == 0 && threadIdx.x == 0) own.before.set(x);
  return x;
}

// x in front of the warp's tile, `all` being what it makes of x, and `first` the block's first tile
// of the same piece.
template <bool kForwardInTime>
FASTRL_DEVICE double carry(const Slots& slots, Shared& shared, const Affine& all, int first) {
  const int tile = warp_of_thread();
  if (lane_of_thread() == kLanes - 1) shared.tiles[tile] = all;
  __syncthreads();
  double x = 0.0;
  if (shared.chained_tiles > 0) {
    const double before = chain<kForwardInTime>(slots, shared);
    if (first == shared.chained_first) x = before;
  }
#pragma unroll 1
  for (int i = first; i < tile; ++i) x = shared.tiles[i](x);
  return x;
}

// Blocks on a multiprocessor: as many as leave the registers that an estimator's inputs need.
template <class E, class T>
constexpr int kBlocks = sizeof(T) == 8                        ? 1
                        : (E::kReads & (kLogRatio | kErrors)) ? 2
                                                              : 3;

template <class E, class T>
__global__ void __launch_bounds__(kThreads, (kBlocks<E, T>))
    scan_kernel(const Trajectories<T> x, const Slots slots) {
  constexpr bool kForwardInTime = E::kForwardInTime;
  __shared__ Shared shared;
  take_window<kForwardInTime>(slots, shared);
  const bool all_long = !x.rows.cu_seqlens && x.rows.length > kTile;
  const bool all_short = !x.rows.cu_seqlens && x.rows.length <= kTile;
  const Stretch<kForwardInTime> stretch(shared, x.rows);
  if (!all_long) stretch.begin();
  Pieces pieces;
  for (bool is_short = !all_long, is_first = true;;) {
    Place place;
    int first = 0;
    if (is_short) {
      is_short = stretch.next(place);
      if (!is_short && all_short) return;
    }
    if (!is_short) {
      // The pieces are there; or the tiles of those before have been read.
      if (!(is_first && all_long)) __syncthreads();
      is_first = false;
      if (warp_of_thread() == 0) pieces.assign<kForwardInTime>(shared, x.rows);
      __syncthreads();
      if (shared.assigned[0].piece.length == 0) return;
      place = assigned_place(shared, x.rows, first);
    }
    int64_t ahead = -1;
    if (!is_short && Tile<E, T>::looks_ahead(x)) ahead = action_behind(x.mask, place);
    Tile<E, T> tile(x, place);
    const Affine all = tile.compose_steps(x, ahead);
    double before = 0.0;
    if (!is_short) before = carry<kForwardInTime>(slots, shared, all, first);
    tile.write(x, before);
    if (!is_short && shared.is_last) return;
  }
}

// What a launch needs: blocks, and bytes of Slots, all of whose bits are set.
struct ScanLaunch {
  int64_t blocks;
  size_t bytes;

  explicit ScanLaunch(const Rows& rows) : blocks((rows.total + kChunk - 1) / kChunk), bytes(0) {
    const bool chains = (rows.cu_seqlens ? rows.total : rows.length) > kChunk;
    if (chains) bytes = sizeof(unsigned long long) + blocks * sizeof(Slots::Chunk);
  }
  Slots slots(void* memory) const {
    if (bytes == 0) return {};
    auto* taken = static_cast<unsigned long long*>(memory);
    return {taken, reinterpret_cast<Slots::Chunk*>(taken + 1)};
  }
};

}  // namespace fastrl::cuda
