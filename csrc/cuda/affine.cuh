// x -> b + a x, the steps of a recursion, and what they compose to.
#pragma once

#include "rows.cuh"

namespace fastrl::cuda {

struct Affine {
  double a, b;

  FASTRL_DEVICE static Affine identity() { return {1.0, 0.0}; }
  // Where a is 0 nothing behind is looked at: 0 * inf would be nan.
  FASTRL_DEVICE double operator()(double x) const { return a == 0.0 ? b : fma(a, x, b); }
};

constexpr double kSmallest = 4.9406564584124654e-324, kLargest = 1e300;

// `then` after `first`. A product of many factors leaves the range of a double long before a row
// ends. Then it still is not 0: an inf or nan that follows is to be seen by every step that it
// reaches; nor infinite: times 0 it is 0.
FASTRL_DEVICE Affine compose(const Affine& then, const Affine& first) {
  Affine both{then.a * first.a, then(first.b)};
  if (both.a == 0.0 || then.a == 0.0 || first.a == 0.0) {
    both.a = then.a == 0.0 || first.a == 0.0 ? 0.0 : kSmallest;
  }
  if (both.a > kLargest) both.a = kLargest;
  return both;
}

FASTRL_DEVICE Affine shuffle_up(const Affine& f, int lanes) {
  return {__shfl_up_sync(kAllLanes, f.a, lanes), __shfl_up_sync(kAllLanes, f.b, lanes)};
}

// Each lane's own after those of the `before` lanes below it, which belong to the same row. The
// order of composition depends on `before` alone.
FASTRL_DEVICE Affine compose_lanes(Affine f, int before) {
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    const Affine below = shuffle_up(f, lanes);
    if (lanes <= before) f = compose(f, below);
  }
  return f;
}

}  // namespace fastrl::cuda
