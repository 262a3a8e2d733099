// From what the rewards are owed to what the values are: b_t has r_t + c_t v_{t+1} in it, so that
//
//   u_t = c_t grad_rewards_t
//
// is owed to v_{t+1}, which is next_values_t, or the value of the next action, or bootstrap_value.
// A thread for each step; 4 bytes read and 4 written of each result, and the flags.
#pragma once

#include "steps.cuh"

namespace fastrl::cuda {

struct ValueGrads {
  // own: values_t is in the output itself (grad_second: its gradient) and, negated, in b_t.
  // only_at_cuts: v_{t+1} is read at truncations and at a row's last action alone.
  // has_next_values: it was next_values_t.
  bool own, only_at_cuts, has_next_values;
};

// x.grad_first: grad_rewards. x.grad_second: grad_returns. x.carried: u, where it is not that.
// x.out: grad_values, grad_next_values, grad_bootstrap_value (row_stride 1, and 0 to begin with).
template <class T>
__global__ void __launch_bounds__(kStepThreads, 4)
    value_grads_kernel(const Trajectories<T> x, const ValueGrads what) {
  using R = Result<T>;
  const Here own = here(x.rows, x.mask);
  const auto owed = [&](int64_t t, bool is_last) {
    if (x.carried) return *x.carried.at(own.index, t);
    const auto at = path_at<Numbers<R>>(x, own.index, t);
    if (what.only_at_cuts && !at.truncated && !is_last) return R{};
    return through<Numbers<R>>(at.discount(), *x.grad_first.at(own.index, t));
  };
  // Only a row's end is searched for in vain, and only by its last action.
  bool is_last = false;
  if (x.out[2] || what.only_at_cuts) {
    is_last = own.length <= action_from_each<1>(own.acts, x.mask, own.index, own.t + 1, own.length);
  }
  int64_t previous = -1;
  if (x.out[0] && !what.has_next_values) {
    previous = action_from_each<-1>(own.acts, x.mask, own.index, own.t - 1, own.length);
  }
  if (!own.exists) return;
  if (x.out[0]) {
    R grad{};
    if (own.acts && what.own) {
      if (x.grad_second) grad = *x.grad_second.at(own.index, own.t);
      grad -= *x.grad_first.at(own.index, own.t);
    }
    if (own.acts && !what.has_next_values && previous >= 0) grad += owed(previous, false);
    *x.out[0].at(own.index, own.t) = grad;
  }
  if (x.out[1]) *x.out[1].at(own.index, own.t) = own.acts ? owed(own.t, is_last) : R{};
  if (x.out[2] && own.acts && is_last) *x.out[2].at(own.row, 0) = owed(own.t, true);
}

}  // namespace fastrl::cuda
