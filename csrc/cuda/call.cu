// From the tensors of a call on trajectories to the rows of its kernel.
#include "returns.h"

namespace fastrl::cuda {
namespace {

int32_t aoti_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? aoti_torch_dtype_float64()
         : dtype == ScalarType::Long ? aoti_torch_dtype_int64()
                                     : aoti_torch_dtype_float32();
}

// strides[d] of a contiguous tensor for d < dims, where a step along dimension dims - 1 is 1.
void fill_strides(std::vector<int64_t>& strides, const std::vector<int64_t>& shape, size_t dims) {
  int64_t stride = 1;
  for (size_t d = dims; d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, shape[d]);
  }
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace

Call::Call(const Tensor& like, const std::optional<Tensor>& cu_seqlens)
    : device_(like.get_device_index()),
      guard_(device_),
      stream_(current_stream(device_)),
      rows_{nullptr, 1, 0, like.numel()} {
  STD_TORCH_CHECK(like.dim() >= 1, "fastrl: expected a time axis");
  const auto sizes = like.sizes();
  shape_.assign(sizes.begin(), sizes.end());
  rows_.length = shape_.back();
  for (size_t d = 0; d + 1 < shape_.size(); ++d) rows_.count *= shape_[d];
  if (cu_seqlens) {
    STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->is_contiguous() &&
                        cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1 && like.dim() == 1 &&
                        cu_seqlens->get_device_index() == device_,
                    "fastrl: cu_seqlens must be contiguous int32 [S + 1], and the steps packed");
    rows_.cu_seqlens = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
    rows_.count = cu_seqlens->numel() - 1;
    STD_TORCH_CHECK(rows_.count > 0 || rows_.total == 0, "fastrl: steps without a segment");
  } else {
    time_major_ = rows_.total > 0 && rows_.length > 1 && like.stride(like.dim() - 1) != 1;
  }
}

// All axes before the last as one. Rows may lie anywhere: one behind the other, in a larger tensor,
// or side by side.
Call::Strides Call::strides_of(const Tensor& t, const char* name) const {
  const auto sizes = t.sizes(), strides = t.strides();
  bool fits = sizes.size() == shape_.size() && t.get_device_index() == device_;
  int64_t rows = 1, row_stride = 0;
  for (size_t d = shape_.size(); fits && d-- > 0;) {
    fits = sizes[d] == shape_[d];
    if (d + 1 == shape_.size() || sizes[d] == 1) continue;
    if (rows == 1) row_stride = strides[d];
    fits &= rows_.total == 0 || strides[d] == row_stride * rows;
    rows *= sizes[d];
  }
  STD_TORCH_CHECK(fits, "fastrl: ", name,
                  " must have the shape and device of its op, and one stride from row to row");
  const int64_t step_stride = strides[shape_.size() - 1];
  return {rows_.cu_seqlens ? step_stride : row_stride, step_stride};
}

Tensor Call::empty(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                   ScalarType dtype) const {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides.data(), aoti_dtype(dtype),
                                                  aoti_torch_device_type_cuda(), device_, &handle));
  return Tensor(handle);
}

Tensor Call::empty(ScalarType dtype, bool wanted) const {
  if (!wanted) return empty({0}, {1}, dtype);
  std::vector<int64_t> strides(shape_.size());
  fill_strides(strides, shape_, time_major_ ? shape_.size() - 1 : shape_.size());
  if (time_major_) strides.back() = rows_.count;
  return empty(shape_, strides, dtype);
}

Tensor Call::empty_per_row(ScalarType dtype, bool wanted) const {
  if (!wanted) return empty({0}, {1}, dtype);
  std::vector<int64_t> shape(shape_.begin(), shape_.end() - 1);
  if (rows_.cu_seqlens) shape = {rows_.count};
  std::vector<int64_t> strides(shape.size());
  fill_strides(strides, shape, shape.size());
  return empty(shape, strides, dtype);
}

}  // namespace fastrl::cuda
