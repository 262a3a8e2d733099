// The next n rewards and the value of the state that they lead to:
//
//   G^n_t = r_t + c_t (k_t G^{n-1}_{t+1} + (1 - k_t) v_{t+1}),   G^1_t = r_t + c_t v_{t+1}
//
// A thread walks the n steps in double, and ends early where nothing follows. Neighbours read the
// same lines, so that an input comes from memory once and n - 1 times from a cache.
#pragma once

#include "steps.cuh"

namespace fastrl::cuda {

template <class T>
__global__ void __launch_bounds__(kStepThreads, 3)
    n_step_kernel(const Trajectories<T> x, const int64_t n) {
  using N = Numbers<double>;
  const Here own = here(x.rows, x.mask);
  bool walks = own.acts;
  int64_t t = own.t;
  double sum = 0.0, factor = 1.0;
#pragma unroll 1
  for (int64_t step = 1; __any_sync(kAllLanes, walks); ++step) {
    Step<N> at{};
    if (walks) {
      at = path_at<N>(x, own.index, t);
      sum += factor * number_of(*x.reward.at(own.index, t));
      walks = at.discount().wide != 0.0;
    }
    const int64_t next = action_from_each<1>(walks, x.mask, own.index, t + 1, own.length);
    if (!walks) continue;
    factor *= at.discount().wide;
    const bool is_last = next >= own.length;
    if (step >= n || is_last || at.truncated) {
      double value = 0.0;
      if (x.next_value) {
        value = number_of(*x.next_value.at(own.index, t));
      } else if (!is_last) {
        value = number_of(*x.value.at(own.index, next));
      } else if (x.bootstrap) {
        value = number_of(*x.bootstrap.at(own.row, 0));
      }
      sum += factor * value;
      walks = false;
    }
    t = next;
  }
  if (own.exists) *x.out[0].at(own.index, own.t) = static_cast<Result<T>>(sum);
}

// Transposed, with g the gradient and a = c k: the windows of n that hold step j owe to r_j
//
//   s_j = g_j + a_{j-1} (g_{j-1} + a_{j-2} (g_{j-2} + ... )),   n terms
//
// the last of which, f_j, is of the window that ends at j and goes on to v_{j+1}. To v_{j+1} is
// owed c_j f_j, and c_j s_j where all windows end: at a truncation, and at the row's last action.
template <class T>
__global__ void __launch_bounds__(kStepThreads, 3)
    n_step_backward_kernel(const Trajectories<T> x, const int64_t n) {
  using N = Numbers<double>;
  const Here own = here(x.rows, x.mask);
  double sum = own.acts ? number_of(*x.grad_first.at(own.index, own.t)) : 0.0;
  double last_term = n == 1 ? sum : 0.0, factor = 1.0;
  bool walks = own.acts;
  int64_t t = own.t;
#pragma unroll 1
  for (int64_t step = 2; step <= n && __any_sync(kAllLanes, walks); ++step) {
    t = action_from_each<-1>(walks, x.mask, own.index, t - 1, own.length);
    if (!walks) continue;
    const double a = t >= 0 ? path_at<N>(x, own.index, t).unbroken().wide : 0.0;
    walks = a != 0.0;
    if (!walks) continue;
    factor *= a;
    const double term = factor * number_of(*x.grad_first.at(own.index, t));
    sum += term;
    if (step == n) last_term = term;
  }
  const int64_t next = action_from_each<1>(own.acts, x.mask, own.index, own.t + 1, own.length);
  if (!own.exists) return;
  double grad_next = 0.0;
  if (own.acts) {
    const Step<N> at = path_at<N>(x, own.index, own.t);
    const bool ends = at.truncated || next >= own.length;
    grad_next = through<N>(at.discount(), ends ? sum : last_term);
  }
  using R = Result<T>;
  *x.out[0].at(own.index, own.t) = static_cast<R>(sum);
  *x.out[1].at(own.index, own.t) = static_cast<R>(grad_next);
}

}  // namespace fastrl::cuda
