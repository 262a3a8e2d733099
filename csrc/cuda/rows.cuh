// Which row a step belongs to, and which action of a row comes next. All functions but the smallest
// are called by whole warps.
#pragma once

#include "numbers.cuh"

namespace fastrl::cuda {

FASTRL_DEVICE int lane_of_thread() { return threadIdx.x % kLanes; }
FASTRL_DEVICE unsigned lanes_below(int lane) { return (1u << lane) - 1; }

FASTRL_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTRL_DEVICE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// Dense rows of `length` steps, or packed ones. Steps are counted through all rows.
struct Rows {
  const int32_t* cu_seqlens;  // of packed rows: [count + 1]
  int64_t count, length, total;

  // `total` for rows behind the last. cu_seqlens is not trusted: nothing is read out of bounds.
  FASTRL_DEVICE int64_t begin(int64_t row) const {
    if (row >= count) return total;
    return cu_seqlens ? larger(0, smaller(cu_seqlens[row], total)) : row * length;
  }
  // The last row that begins at or before `step` < total: the one that holds it.
  FASTRL_DEVICE int64_t at(int64_t step) const {
    return cu_seqlens ? last_beginning_by(step) : step / length;
  }
  // The same for each lane, whose steps rise from lane to lane.
  FASTRL_DEVICE int64_t at_each(int64_t step) const {
    if (!cu_seqlens) return step / length;
    int64_t low = last_beginning_by(__shfl_sync(kAllLanes, step, 0));
    int64_t high = last_beginning_by(__shfl_sync(kAllLanes, step, kLanes - 1));
    while (low < high) {
      const int64_t middle = high - (high - low) / 2;
      if (begin(middle) <= step) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
  // A row's index in an array's row_stride.
  FASTRL_DEVICE int64_t index(int64_t row, int64_t begin) const { return cu_seqlens ? begin : row; }

 private:
  // Five bits of the answer at a time.
  FASTRL_DEVICE int64_t last_beginning_by(int64_t step) const {
    int64_t low = 0, high = count;
    while (high - low > 1) {
      const int64_t stride = (high - low + kLanes - 1) / kLanes;
      const int64_t probe = low + stride * (lane_of_thread() + 1);
      const bool by = probe < high && begin(probe) <= step;
      const int64_t passed = __popc(__ballot_sync(kAllLanes, by));
      high = smaller(high, low + stride * (passed + 1));
      low += stride * passed;
    }
    return low;
  }
};

using Flags = Array<const uint8_t>;

// The first action of `row` at or behind step t in direction kStep, or what lies outside of
// [0, length). Called by a warp with the same arguments; a gap of n steps costs n / 2048 round
// trips to memory where its flags are contiguous.
template <int kStep>
FASTRL_DEVICE int64_t action_from(const Flags& mask, int64_t row, int64_t t, int64_t length) {
  constexpr bool kAhead = kStep > 0;
  if (!mask || t < 0 || t >= length || *mask.at(row, t)) return t;
  constexpr int kLoads = 4;
  struct alignas(16) Bytes {
    uint64_t low, high;
  };
  const bool dense = mask.step_stride == 1;
  const int width = dense ? sizeof(Bytes) : 1;
  while (t >= 0 && t < length) {
    // Lane l takes pieces l, l + 32, ... in direction kStep from the one that holds t.
    const auto address = reinterpret_cast<uintptr_t>(mask.at(row, t));
    const int64_t start = dense ? t - static_cast<int64_t>(address % sizeof(Bytes)) : t;
    bool found[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t piece = start + kStep * width * (i * kLanes + lane_of_thread());
      const int64_t low = larger(piece, kAhead ? t : 0);
      const int64_t high = smaller(piece + width, kAhead ? length : t + 1);
      found[i] = false;
      if (high - low == static_cast<int64_t>(sizeof(Bytes))) {
        const Bytes bytes = *reinterpret_cast<const Bytes*>(mask.at(row, piece));
        found[i] = (bytes.low | bytes.high) != 0;
      } else {
#pragma unroll 1
        for (int64_t u = low; u < high; ++u) found[i] |= *mask.at(row, u) != 0;
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const unsigned lanes = __ballot_sync(kAllLanes, found[i]);
      if (lanes == 0) continue;
      const int64_t piece = start + kStep * width * (i * kLanes + __ffs(lanes) - 1);
      t = kAhead ? larger(piece, t) : smaller(piece + width - 1, t);
#pragma unroll 1
      while (!*mask.at(row, t)) t += kStep;
      return t;
    }
    t = start + kStep * width * kLoads * kLanes + (kAhead ? 0 : width - 1);
  }
  return t;
}

// The same for the lanes that ask, each with a row of its own.
template <int kStep>
FASTRL_DEVICE int64_t action_from_each(bool asks, const Flags& mask, int64_t row, int64_t t,
                                       int64_t length) {
  if (!mask) return t;
  asks = asks && t >= 0 && t < length && !*mask.at(row, t);
  for (unsigned lanes; (lanes = __ballot_sync(kAllLanes, asks)) != 0;) {
    const int lane = __ffs(lanes) - 1;
    const int64_t found =
        action_from<kStep>(mask, __shfl_sync(kAllLanes, row, lane), __shfl_sync(kAllLanes, t, lane),
                           __shfl_sync(kAllLanes, length, lane));
    if (lane == lane_of_thread()) {
      t = found;
      asks = false;
    }
  }
  return t;
}

}  // namespace fastrl::cuda
