// Kernels with a thread for each step, which looks at its neighbours in time.
#pragma once

#include "tile.cuh"

namespace fastrl::cuda {

constexpr int kStepThreads = 256;

__host__ inline int64_t step_blocks(const Rows& rows) {
  return (rows.total + kStepThreads - 1) / kStepThreads;
}

// The thread's step. All threads of a warp have one, but those behind the last do not act.
struct Here {
  int64_t row, index, length, t;
  bool exists, acts;
};

FASTRL_DEVICE Here here(const Rows& rows, const Flags& mask) {
  const int64_t step = static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x;
  const bool exists = step < rows.total;
  const int64_t within = smaller(step, rows.total - 1);
  const int64_t row = rows.at_each(within), begin = rows.begin(row);
  const int64_t index = rows.index(row, begin), t = within - begin;
  const bool acts = exists && (!mask || *mask.at(index, t));
  return {row, index, rows.begin(row + 1) - begin, t, exists, acts};
}

// What decides how much of step t + 1 reaches step t.
template <class N, class T>
FASTRL_DEVICE Step<N> path_at(const Trajectories<T>& x, int64_t index, int64_t t) {
  Step<N> step{};
  step.gamma = x.gamma ? number_of(*x.gamma.at(index, t)) : x.constant_gamma.wide;
  step.terminated = x.terminated && *x.terminated.at(index, t);
  step.truncated = x.truncated && *x.truncated.at(index, t);
  return step;
}

}  // namespace fastrl::cuda
