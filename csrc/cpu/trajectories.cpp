// From the tensors of a call on trajectories to the arrays of a scan.
#include "returns.h"

namespace fastrl {
namespace {

Float float_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Float::f32;
    case ScalarType::Double:
      return Float::f64;
    case ScalarType::BFloat16:
      return Float::bf16;
    case ScalarType::Half:
      return Float::f16;
    default:
      STD_TORCH_CHECK(false, "fastrl: ", name, " must be a floating-point tensor");
  }
}

}  // namespace

Rows::Rows(const Tensor& like, const std::optional<Tensor>& cu_seqlens)
    : like_(like), num_steps_(like.numel()) {
  STD_TORCH_CHECK(like.dim() >= 1, "fastrl: expected a time axis");
  if (cu_seqlens) {
    STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->is_contiguous() &&
                        cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1 && like.dim() == 1,
                    "fastrl: cu_seqlens must be contiguous int32 [S + 1], and the steps packed");
    cu_seqlens_ = ptr<int32_t>(*cu_seqlens);
    count_ = cu_seqlens->numel() - 1;
    bool rising = cu_seqlens_[0] == 0 && cu_seqlens_[count_] == num_steps_;
    for (int64_t s = 0; s < count_; ++s) rising &= cu_seqlens_[s] <= cu_seqlens_[s + 1];
    STD_TORCH_CHECK(rising, "fastrl: cu_seqlens must rise from 0 to the number of steps");
    return;
  }
  length_ = like.size(like.dim() - 1);
  for (int64_t d = 0; d + 1 < like.dim(); ++d) count_ *= like.size(d);
  time_major_ = num_steps_ > 0 && length_ > 1 && like.stride(like.dim() - 1) != 1;
}

int64_t Rows::longest() const {
  if (!cu_seqlens_) return length_;
  int64_t most = 0;
  for (int64_t s = 0; s < count_; ++s) most = std::max(most, length(s));
  return most;
}

int64_t Rows::first_from(int64_t step) const {
  if (!cu_seqlens_) return length_ == 0 ? 0 : std::min(count_, (step + length_ - 1) / length_);
  return std::lower_bound(cu_seqlens_, cu_seqlens_ + count_, step) - cu_seqlens_;
}

Piece Rows::piece(int64_t s, int together) const {
  const int64_t n = length(s);
  if (packed()) return {0, begin(s), s, n, 0, n, 1};
  return {s, 0, s, n, 0, n, together};
}

// From row to row, or from step to step where time_major, once all axes before the last are one.
int64_t Rows::stride_of(const Tensor& t, const char* name) const {
  STD_TORCH_CHECK(t.dim() == like_.dim(), "fastrl: ", name, " must have the axes of its op");
  int64_t rows = 1, row_stride = 0;
  bool collapses = true;
  for (int64_t d = t.dim() - 1; d-- > 0;) {
    STD_TORCH_CHECK(t.size(d) == like_.size(d), "fastrl: ", name, " must have the shape of its op");
    if (t.size(d) == 1) continue;
    if (rows == 1) {
      row_stride = t.stride(d);
    } else {
      collapses &= t.stride(d) == row_stride * rows;
    }
    rows *= t.size(d);
  }
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.size(last) == like_.size(last), "fastrl: ", name,
                  " must have the shape of its op");
  const bool fits =
      time_major_ ? rows == 1 || row_stride == 1 : t.size(last) <= 1 || t.stride(last) == 1;
  STD_TORCH_CHECK(num_steps_ == 0 || (collapses && fits), "fastrl: ", name,
                  " must be laid out in rows, or like a transposed [T, B] where its op is");
  return time_major_ ? t.stride(last) : row_stride;
}

Floats Rows::floats(const Tensor& t, const char* name) const {
  return {t.const_data_ptr(), float_of(t, name), stride_of(t, name)};
}
Floats Rows::floats(const std::optional<Tensor>& t, const char* name) const {
  return t ? floats(*t, name) : Floats{};
}
Flags Rows::flags(const std::optional<Tensor>& t, const char* name) const {
  if (!t) return {};
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Bool, "fastrl: ", name, " must be bool");
  return {ptr<uint8_t>(*t), stride_of(*t, name)};
}
Floats Rows::per_row(const std::optional<Tensor>& t, const char* name) const {
  if (!t) return {};
  STD_TORCH_CHECK(t->numel() == count_ && t->is_contiguous(), "fastrl: ", name,
                  " must hold one number per row, contiguous");
  return {t->const_data_ptr(), float_of(*t, name), 1};
}

Tensor Rows::empty(ScalarType dtype) const {
  const std::vector<int64_t> shape = shape_of(like_);
  std::vector<int64_t> strides = strides_of(shape, shape.size(), 1);
  if (time_major_) {
    strides = strides_of(shape, shape.size() - 1, 1);
    strides.back() = count_;
  }
  return empty_cpu(shape, strides, dtype);
}

Tensor Rows::empty_per_row(ScalarType dtype) const {
  std::vector<int64_t> shape = shape_of(like_);
  shape.pop_back();
  return empty_cpu(packed() ? std::vector<int64_t>{count_} : shape, dtype);
}

Results Rows::results(const Tensor& t) const {
  if (t.numel() == 0) return {};
  return {t.mutable_data_ptr(), float_of(t, "a result"), stride_of(t, "a result")};
}

ScalarType result_type(std::initializer_list<const Tensor*> tensors, const Path& path,
                       const Bootstrap& end) {
  bool any = false;
  for (const auto* t :
       {&path.gamma_per_step, &path.lambda_per_step, &end.value, &end.next_values}) {
    any |= *t && (*t)->scalar_type() == ScalarType::Double;
  }
  for (const Tensor* t : tensors) any |= t->scalar_type() == ScalarType::Double;
  return any ? ScalarType::Double : ScalarType::Float;
}

Trajectories trajectories(const Rows& rows, const Path& path) {
  Trajectories x;
  x.terminated = rows.flags(path.terminated, "terminated");
  x.truncated = rows.flags(path.truncated, "truncated");
  x.mask = rows.flags(path.mask, "mask");
  x.gamma = rows.floats(path.gamma_per_step, "gamma");
  x.gae_lambda = rows.floats(path.lambda_per_step, "gae_lambda");
  x.constant_gamma = path.gamma;
  x.constant_lambda = path.gae_lambda;
  x.time_major = rows.time_major();
  return x;
}

Trajectories trajectories(const Rows& rows, const Path& path, const Bootstrap& end) {
  STD_TORCH_CHECK(!path.truncated || end.next_values, "fastrl: truncated needs next_values");
  STD_TORCH_CHECK(!end.value || !end.next_values,
                  "fastrl: next_values and bootstrap_value exclude each other");
  Trajectories x = trajectories(rows, path);
  x.bootstrap_value = rows.per_row(end.value, "bootstrap_value");
  x.next_values = rows.floats(end.next_values, "next_values");
  return x;
}

}  // namespace fastrl
