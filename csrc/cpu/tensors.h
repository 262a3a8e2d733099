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
#include <cstring>
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
inline Tensor empty_cpu(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                        ScalarType dtype) {
  const bool is_eight = dtype == ScalarType::Double || dtype == ScalarType::Long;
  const bool is_four = dtype == ScalarType::Float || dtype == ScalarType::Int;
  size_t bytes = is_eight ? 8 : is_four ? 4 : 2;
  for (const int64_t size : shape) bytes *= size;
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

// strides[d] of a contiguous tensor, for d < dims; a step along dimension dims - 1 is `unit`.
inline std::vector<int64_t> strides_of(const std::vector<int64_t>& shape, size_t dims,
                                       int64_t unit) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = dims; d-- > 0;) {
    strides[d] = unit;
    unit *= std::max<int64_t>(1, shape[d]);
  }
  return strides;
}

inline Tensor empty_cpu(const std::vector<int64_t>& shape, ScalarType dtype) {
  return empty_cpu(shape, strides_of(shape, shape.size(), 1), dtype);
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

}  // namespace fastrl
