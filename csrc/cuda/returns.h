// What the launchers of the returns' kernels share: from a call's tensors to the arrays of a
// kernel, and the launch. User errors are caught earlier, in Python.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "launch.h"

// torch declares it where USE_CUDA is defined.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastrl::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What decides which step follows which, as all ops on trajectories take it.
struct Path {
  const std::optional<Tensor>&terminated, &truncated, &mask, &cu_seqlens, &gamma_per_step,
      &lambda_per_step;
  double gamma, gae_lambda;
};

#define FASTRL_CUDA_PATH_ARGUMENTS                                                             \
  const std::optional<Tensor>&terminated, const std::optional<Tensor>&truncated,               \
      const std::optional<Tensor>&mask, const std::optional<Tensor>&cu_seqlens,                \
      const std::optional<Tensor>&gamma_per_step, const std::optional<Tensor>&lambda_per_step, \
      double gamma, double gae_lambda
#define FASTRL_CUDA_PATH                                                                        \
  Path {                                                                                        \
    terminated, truncated, mask, cu_seqlens, gamma_per_step, lambda_per_step, gamma, gae_lambda \
  }
// With the value behind the last step, in front of them.
#define FASTRL_CUDA_STEPS_ARGUMENTS                                                     \
  const std::optional<Tensor>&bootstrap_value, const std::optional<Tensor>&next_values, \
      FASTRL_CUDA_PATH_ARGUMENTS

struct Bootstrap {
  const std::optional<Tensor>&value, &next_values;
};

template <class T>
constexpr ScalarType kDtype = ScalarType::Float;
template <>
constexpr ScalarType kDtype<double> = ScalarType::Double;
template <>
constexpr ScalarType kDtype<__nv_bfloat16> = ScalarType::BFloat16;
template <>
constexpr ScalarType kDtype<__half> = ScalarType::Half;
template <>
constexpr ScalarType kDtype<uint8_t> = ScalarType::Bool;

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>) for the dtype of the inputs.
template <class F>
auto with_dtype(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::Double:
      return f(Type<double>{});
    case ScalarType::BFloat16:
      return f(Type<__nv_bfloat16>{});
    case ScalarType::Half:
      return f(Type<__half>{});
    default:
      STD_TORCH_CHECK(false, "fastrl: expected a floating-point tensor");
  }
}

// A backward pass has gradients in the results' dtype, and of its inputs those of the path.
inline ScalarType path_dtype(const Path& path, const Tensor& grad) {
  if (path.gamma_per_step) return path.gamma_per_step->scalar_type();
  if (path.lambda_per_step) return path.lambda_per_step->scalar_type();
  return grad.scalar_type();
}

// The call's device, stream and rows; how its tensors are laid out, and those that it makes.
class Call {
 public:
  Call(const Tensor& like, const std::optional<Tensor>& cu_seqlens);

  const Rows& rows() const { return rows_; }
  cudaStream_t stream() const { return stream_; }
  // All arrays so far hold the steps one row behind the other, and begin at whole vectors.
  bool side_by_side() const { return side_by_side_; }

  template <class T>
  Array<const T> read(const Tensor& t, const char* name) const {
    check_dtype<T>(t, name);
    const Strides strides = strides_of(t, name);
    return noted(
        Array<const T>{static_cast<const T*>(t.const_data_ptr()), strides.row, strides.step});
  }
  template <class T>
  Array<const T> read(const std::optional<Tensor>& t, const char* name) const {
    return t ? read<T>(*t, name) : Array<const T>{};
  }
  // One entry a row.
  template <class T>
  Array<const T> read_per_row(const std::optional<Tensor>& t, const char* name) const {
    if (!t) return {};
    check_dtype<T>(*t, name);
    STD_TORCH_CHECK(
        t->numel() == rows_.count && t->is_contiguous() && t->get_device_index() == device_,
        "fastrl: ", name, " must hold one number per row, contiguous");
    return {static_cast<const T*>(t->const_data_ptr()), 1, 0};
  }
  // Of a result that was asked for.
  template <class T>
  Array<T> write(const Tensor& t) const {
    if (t.numel() == 0) return {};
    check_dtype<T>(t, "a result");
    const Strides strides = strides_of(t, "a result");
    return noted(Array<T>{static_cast<T*>(t.mutable_data_ptr()), strides.row, strides.step});
  }

  // Shaped and laid out like the steps; without entries where it is not wanted.
  Tensor empty(ScalarType dtype, bool wanted = true) const;
  Tensor empty_per_row(ScalarType dtype, bool wanted = true) const;
  Tensor empty(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
               ScalarType dtype) const;

  template <class T>
  Trajectories<T> trajectories(const Path& path) const {
    Trajectories<T> x{};
    x.rows = rows_;
    x.terminated = read<uint8_t>(path.terminated, "terminated");
    x.truncated = read<uint8_t>(path.truncated, "truncated");
    x.mask = read<uint8_t>(path.mask, "mask");
    x.gamma = read<T>(path.gamma_per_step, "gamma");
    x.lambda = read<T>(path.lambda_per_step, "gae_lambda");
    x.constant_gamma = path.gamma;
    x.constant_lambda = path.gae_lambda;
    return x;
  }
  template <class T>
  Trajectories<T> trajectories(const Path& path, const Bootstrap& end) const {
    STD_TORCH_CHECK(!path.truncated || end.next_values, "fastrl: truncated needs next_values");
    STD_TORCH_CHECK(!end.value || !end.next_values,
                    "fastrl: next_values and bootstrap_value exclude each other");
    Trajectories<T> x = trajectories<T>(path);
    x.bootstrap = read_per_row<T>(end.value, "bootstrap_value");
    x.next_value = read<T>(end.next_values, "next_values");
    return x;
  }

 private:
  struct Strides {
    int64_t row, step;
  };
  Strides strides_of(const Tensor& t, const char* name) const;
  template <class T>
  static void check_dtype(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == kDtype<T>, "fastrl: ", name, " must have its op's dtype");
  }

  template <class T>
  Array<T> noted(const Array<T>& x) const {
    const bool flat = rows_.cu_seqlens || rows_.count <= 1 || x.row_stride == rows_.length;
    side_by_side_ &= flat && x.step_stride == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
    return x;
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  std::vector<int64_t> shape_;
  Rows rows_;
  bool time_major_ = false;
  mutable bool side_by_side_ = true;
};

inline void check(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "fastrl: ", cudaGetErrorString(status));
}

template <class E, class T>
void scan(const Call& call, Trajectories<T>& x) {
  x.side_by_side = call.side_by_side();
  const size_t bytes = ScanLaunch(x.rows).bytes;
  Tensor memory;  // given back in the order of the stream
  void* at = nullptr;
  if (bytes > 0) {
    memory = call.empty({static_cast<int64_t>(bytes / 8)}, {1}, ScalarType::Long);
    at = memory.mutable_data_ptr();
    check(cudaMemsetAsync(at, 0xff, bytes, call.stream()));
  }
  check(launch_scan<E>(x, at, call.stream()));
}

}  // namespace fastrl::cuda
