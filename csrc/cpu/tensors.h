// From the stable-ABI tensors of a call to what the kernels take, and the checks that keep a wrong
// call from reading foreign memory. User errors are caught earlier, in Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "large_memory.h"

namespace fastrl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
inline const T* ptr(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
inline const T* ptr(const std::optional<Tensor>& t) {
  return t ? ptr<T>(*t) : nullptr;
}
template <class T>
inline T* mutable_ptr(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// The C function behind torch::stable::empty, without its trip through the dispatcher.
inline Tensor empty_cpu(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  const bool is_eight = dtype == ScalarType::Double || dtype == ScalarType::Long;
  const bool is_four = dtype == ScalarType::Float || dtype == ScalarType::Int;
  size_t bytes = is_eight ? 8 : is_four ? 4 : 2;
  for (size_t d = shape.size(); d-- > 0;) {
    if (d + 1 < shape.size()) strides[d] = strides[d + 1] * std::max<int64_t>(1, shape[d + 1]);
    bytes *= shape[d];
  }
  const int32_t type = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::Double   ? aoti_torch_dtype_float64()
                       : dtype == ScalarType::Long     ? aoti_torch_dtype_int64()
                       : dtype == ScalarType::Int      ? aoti_torch_dtype_int32()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float16();
  if (bytes > kLarge) {
    const Tensor large = large_empty(shape, strides, type, bytes);
    if (large.defined()) return large;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides.data(), type,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

inline void check_like(const Tensor& t, const Tensor& like, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.numel() == like.numel(),
                  "fastrl: ", name, " must be contiguous, with ", like.numel(),
                  " elements and the dtype of its op");
}

}  // namespace fastrl
