// What the estimators of returns share on the CPU: from a call's tensors to trajectories.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "tensors.h"

namespace fastrl {

struct ReturnsArgs {
  const Tensor& rewards;
  const std::optional<Tensor>&values, &bootstrap_value, &next_values, &terminated, &truncated,
      &mask, &cu_seqlens, &gamma_per_step, &lambda_per_step;
  double gamma, gae_lambda;
};

// Rows of a dense [..., T], or the segments of a packed [N].
class Trajectories {
 public:
  explicit Trajectories(const ReturnsArgs& args) : n_(args.rewards.numel()) {
    check_tensors(args);
    if (args.cu_seqlens) {
      const Tensor& cu = *args.cu_seqlens;
      STD_TORCH_CHECK(cu.scalar_type() == ScalarType::Int && cu.is_contiguous() && cu.dim() == 1 &&
                          cu.numel() >= 1,
                      "fastrl: cu_seqlens must be contiguous int32 [S + 1]");
      cu_seqlens_ = ptr<int32_t>(cu);
      count_ = cu.numel() - 1;
      bool rising = cu_seqlens_[0] == 0 && cu_seqlens_[count_] == n_;
      for (int64_t s = 0; s < count_; ++s) rising &= cu_seqlens_[s] <= cu_seqlens_[s + 1];
      STD_TORCH_CHECK(rising, "fastrl: cu_seqlens must rise from 0 to the number of rewards");
    } else {
      STD_TORCH_CHECK(args.rewards.dim() >= 1, "fastrl: rewards must have a time axis");
      length_ = args.rewards.size(args.rewards.dim() - 1);
      count_ = 1;
      for (int64_t d = 0; d + 1 < args.rewards.dim(); ++d) count_ *= args.rewards.size(d);
    }
    if (args.bootstrap_value) {
      STD_TORCH_CHECK(args.bootstrap_value->numel() == count_,
                      "fastrl: bootstrap_value must hold one number per trajectory");
    }
  }

  int64_t count() const { return count_; }
  int64_t grain() const {
    return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, n_ / std::max<int64_t>(1, count_)));
  }
  int64_t begin(int64_t s) const { return cu_seqlens_ ? cu_seqlens_[s] : s * length_; }
  int64_t length(int64_t s) const {
    return cu_seqlens_ ? cu_seqlens_[s + 1] - cu_seqlens_[s] : length_;
  }

 private:
  static void check_tensors(const ReturnsArgs& a) {
    const ScalarType dtype = a.rewards.scalar_type();
    check_like(a.rewards, a.rewards, dtype, "rewards");
    for (const auto* t : {&a.values, &a.next_values, &a.gamma_per_step, &a.lambda_per_step}) {
      if (*t) check_like(**t, a.rewards, dtype, "an argument shaped like rewards");
    }
    for (const auto* t : {&a.terminated, &a.truncated, &a.mask}) {
      if (*t) check_like(**t, a.rewards, ScalarType::Bool, "a bool argument");
    }
    if (a.bootstrap_value) {
      STD_TORCH_CHECK(
          a.bootstrap_value->scalar_type() == dtype && a.bootstrap_value->is_contiguous(),
          "fastrl: bootstrap_value must be contiguous, with the dtype of rewards");
    }
    STD_TORCH_CHECK(!a.truncated || a.next_values, "fastrl: truncated needs next_values");
    STD_TORCH_CHECK(!a.bootstrap_value || !a.next_values,
                    "fastrl: next_values and bootstrap_value exclude each other");
  }

  int64_t n_, count_ = 0, length_ = 0;
  const int32_t* cu_seqlens_ = nullptr;
};

template <class T>
Trajectory<T> all_rows(const ReturnsArgs& a) {
  return {a.rewards.numel(),
          ptr<T>(a.rewards),
          ptr<T>(a.values),
          ptr<T>(a.next_values),
          ptr<T>(a.bootstrap_value),
          ptr<uint8_t>(a.terminated),
          ptr<uint8_t>(a.truncated),
          ptr<uint8_t>(a.mask),
          ptr<T>(a.gamma_per_step),
          ptr<T>(a.lambda_per_step),
          a.gamma,
          a.gae_lambda};
}

template <class T>
Trajectory<T> one_row(Trajectory<T> t, int64_t index, int64_t begin, int64_t length) {
  t.length = length;
  for (const T** p : {&t.rewards, &t.values, &t.next_values, &t.gamma, &t.gae_lambda}) {
    if (*p) *p += begin;
  }
  for (const uint8_t** p : {&t.terminated, &t.truncated, &t.mask}) {
    if (*p) *p += begin;
  }
  if (t.bootstrap_value) t.bootstrap_value += index;
  return t;
}

// body(kernels, trajectory, index, begin), the trajectories spread over torch's threads.
template <class T, class Body>
void run(const ReturnsArgs& args, const Kernels<T>& k, Body body) {
  const Trajectories rows(args);
  const Trajectory<T> all = all_rows<T>(args);
  torch::stable::parallel_for(0, rows.count(), rows.grain(), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      body(k, one_row(all, s, rows.begin(s), rows.length(s)), s, rows.begin(s));
    }
  });
}

template <class Body>
void for_each_trajectory(const ReturnsArgs& args, Body body) {
  switch (args.rewards.scalar_type()) {
    case ScalarType::Float:
      return run<float>(args, kernels().returns_f32, body);
    case ScalarType::Double:
      return run<double>(args, kernels().returns_f64, body);
    default:
      STD_TORCH_CHECK(false, "fastrl: rewards must be float32 or float64");
  }
}

// An output's memory, looked up once a call and not once a row.
struct Output {
  void* data;
  explicit Output(const Tensor& t) : data(t.mutable_data_ptr()) {}
  template <class T>
  T* at(int64_t index) const {
    return static_cast<T*>(data) + index;
  }
};

}  // namespace fastrl
