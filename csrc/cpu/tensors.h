// From the stable-ABI tensors of a call to what the kernels take, and the checks that keep a wrong
// call from reading foreign memory. User errors are caught earlier, in Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "pages.h"

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

inline Tensor empty_cpu(const std::vector<int64_t>& shape, ScalarType dtype) {
  Tensor t = torch::stable::empty(shape, dtype, std::nullopt,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU));
  advise_huge_pages(t.mutable_data_ptr(), t.numel() * t.element_size());
  return t;
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
