// What the estimators of returns share on the CPU: from a call's tensors to the arrays of a scan.
#pragma once

#include "kernels.h"
#include "tensors.h"

namespace fastrl {

// What decides which step follows which, as all ops on trajectories take it.
struct Path {
  const std::optional<Tensor>&terminated, &truncated, &mask, &cu_seqlens, &gamma_per_step,
      &lambda_per_step;
  double gamma, gae_lambda;
};

// The last arguments of each of these ops, and the Path that they make.
#define FASTRL_PATH_ARGUMENTS                                                                  \
  const std::optional<Tensor>&terminated, const std::optional<Tensor>&truncated,               \
      const std::optional<Tensor>&mask, const std::optional<Tensor>&cu_seqlens,                \
      const std::optional<Tensor>&gamma_per_step, const std::optional<Tensor>&lambda_per_step, \
      double gamma, double gae_lambda
#define FASTRL_PATH                                                                             \
  Path {                                                                                        \
    terminated, truncated, mask, cu_seqlens, gamma_per_step, lambda_per_step, gamma, gae_lambda \
  }
// With the value behind the last step, in front of them.
#define FASTRL_STEPS_ARGUMENTS                                                          \
  const std::optional<Tensor>&bootstrap_value, const std::optional<Tensor>&next_values, \
      FASTRL_PATH_ARGUMENTS

struct Bootstrap {
  const std::optional<Tensor>&value, &next_values;
};

// Rows of a dense [..., T], or the segments of a packed [N].
class Rows {
 public:
  Rows(const Tensor& like, const std::optional<Tensor>& cu_seqlens);

  int64_t count() const { return count_; }
  int64_t num_steps() const { return num_steps_; }
  bool time_major() const { return time_major_; }
  bool packed() const { return cu_seqlens_ != nullptr; }
  int64_t begin(int64_t s) const { return cu_seqlens_ ? cu_seqlens_[s] : s * length_; }
  int64_t length(int64_t s) const {
    return cu_seqlens_ ? cu_seqlens_[s + 1] - cu_seqlens_[s] : length_;
  }
  int64_t longest() const;
  // The first row that begins at or behind this step of the batch.
  int64_t first_from(int64_t step) const;
  // All of row s; of `together` rows from s on where time_major.
  Piece piece(int64_t s, int together = 1) const;

  Floats floats(const Tensor& t, const char* name) const;
  Floats floats(const std::optional<Tensor>& t, const char* name) const;
  Flags flags(const std::optional<Tensor>& t, const char* name) const;
  Floats per_row(const std::optional<Tensor>& t, const char* name) const;

  // Shaped and laid out like the rewards: rows side by side stay side by side.
  Tensor empty(ScalarType dtype) const;
  Tensor empty_per_row(ScalarType dtype) const;
  Results results(const Tensor& t) const;

 private:
  int64_t stride_of(const Tensor& t, const char* name) const;

  const Tensor& like_;
  const int32_t* cu_seqlens_ = nullptr;
  int64_t num_steps_, count_ = 1, length_ = 0;
  bool time_major_ = false;
};

// float32, or float64 where one of them is.
ScalarType result_type(std::initializer_list<const Tensor*> tensors, const Path& path,
                       const Bootstrap& end);

// A tensor without entries stands for a result that was not asked for.
inline Tensor nothing(ScalarType dtype) { return empty_cpu({0}, dtype); }
inline Tensor empty_if(bool wanted, const Rows& rows, ScalarType dtype) {
  return wanted ? rows.empty(dtype) : nothing(dtype);
}

// Gradients have the dtype of the results.
inline ScalarType grad_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Trajectories trajectories(const Rows& rows, const Path& path);
Trajectories trajectories(const Rows& rows, const Path& path, const Bootstrap& end);

void run(const Scan& scan, const Trajectories& x, const Rows& rows);

// n_step_returns or its backward pass, row by row.
using Windows = void (*)(const Trajectories&, const Piece&, int64_t n, double* scratch);
void run_windows(Windows windows, int64_t scratch_per_step, const Trajectories& x, const Rows& rows,
                 int64_t n);

}  // namespace fastrl
