// A layer's whole attention of one new token a row, between its two products, on the CPU: queries
// and keys are normalised and rotated, keys and values are written to the cache, and the queries
// attend to it. In float, which is what layers compute in when they are quick.
#include <cmath>

#include "decode_engine.h"

namespace fastrl {
namespace {

using torch::stable::parallel_for;

// What is done to a head [D] before it is compared: x / rms(x) weight, and then the rotation of the
// pairs (x_d, x_{d + D/2}).
struct Position {
  const float *cos, *sin;  // [D], of the row
  int64_t width;
  double eps;

  // Each product and the sum rounded, as by the model's own operations.
  void turn(const float* x, const float* weight, float* out) const {
    const int64_t half = width / 2;
    float normed[kWidest];
    if (weight) {
      double squares = 0.0;
      for (int64_t d = 0; d < width; ++d) squares += double{x[d]} * x[d];
      const float scale = static_cast<float>(1.0 / std::sqrt(squares / width + eps));
      for (int64_t d = 0; d < width; ++d) normed[d] = x[d] * scale * weight[d];
      x = normed;
    }
    for (int64_t d = 0; d < half; ++d) {
      out[d] = x[d] * cos[d] - x[half + d] * sin[d];
      out[half + d] = x[half + d] * cos[half + d] + x[d] * sin[half + d];
    }
  }

  static constexpr int64_t kWidest = 1024;
};

bool is_matrix(const Tensor& x, ScalarType dtype, int64_t rows, int64_t columns) {
  return x.dim() == 2 && x.scalar_type() == dtype && x.is_contiguous() && x.size(0) == rows &&
         x.size(1) == columns;
}

Tensor decode_attention_step_cpu(const Tensor& projected, const Tensor& cos, const Tensor& sin,
                                 const std::optional<Tensor>& query_norm,
                                 const std::optional<Tensor>& key_norm, double eps,
                                 const Tensor& rows, const Tensor& key, const Tensor& value,
                                 const Tensor& key_end, const Tensor& prefix_key,
                                 const Tensor& prefix_value, const Tensor& prefix_end,
                                 const Tensor& prefix_cu_rows, double scale,
                                 std::optional<int64_t> window, std::optional<double> softcap) {
  STD_TORCH_CHECK(projected.dim() == 2 && key.dim() == 4 && rows.dim() == 1,
                  "decode_attention_step: shapes disagree");
  const int64_t count = projected.size(0), batch = key.size(0), num_keys = key.size(2);
  const int64_t key_heads = key.size(1), width = key.size(3);
  const int64_t heads = width ? projected.size(1) / width - 2 * key_heads : 0;
  const auto is_norm = [&](const std::optional<Tensor>& x) {
    return !x || (x->scalar_type() == ScalarType::Float && x->is_contiguous() && x->dim() == 1 &&
                  x->size(0) == width);
  };
  STD_TORCH_CHECK(
      heads > 0 && width % 2 == 0 && width <= Position::kWidest &&
          is_matrix(projected, ScalarType::Float, count, (heads + 2 * key_heads) * width) &&
          is_matrix(cos, ScalarType::Float, count, width) &&
          is_matrix(sin, ScalarType::Float, count, width) && is_norm(query_norm) &&
          is_norm(key_norm) && rows.scalar_type() == ScalarType::Long && rows.is_contiguous() &&
          rows.size(0) == count && key.scalar_type() == ScalarType::Float &&
          key.strides()[3] == 1 && value.dim() == 4 && value.strides()[3] == 1,
      "decode_attention_step: shapes, dtypes or strides disagree");
  const Tensor query = empty_cpu({batch, heads, 1, width}, ScalarType::Float);
  const std::optional<Tensor> end = key_end;
  const Arguments a{query,        key,        value,          {},    end,    prefix_key,
                    prefix_value, prefix_end, prefix_cu_rows, scale, window, softcap};
  const Call call = plan(a);
  const int64_t* const at = ptr<int64_t>(rows);
  const int32_t* const ends = bounds(end, batch);
  std::vector<bool> seen(batch);
  for (int64_t r = 0; r < count; ++r) {
    STD_TORCH_CHECK(at[r] >= 0 && at[r] < batch && ends[at[r]] > 0 && ends[at[r]] <= num_keys,
                    "decode_attention_step: row ", at[r], " has no place in the cache");
    STD_TORCH_CHECK(!seen[at[r]], "decode_attention_step: row ", at[r], " stands there twice");
    seen[at[r]] = true;
  }
  float* const queries = mutable_ptr<float>(query);
  // A row that has ended has queries too: zeros, which read no key of its own.
  if (count < batch) std::memset(queries, 0, batch * heads * width * sizeof(float));
  const Heads<float> keys(key), values(value);
  parallel_for(0, count, 16, [&](int64_t begin, int64_t stop) {
    for (int64_t r = begin; r < stop; ++r) {
      const float* x = ptr<float>(projected) + r * (heads + 2 * key_heads) * width;
      const Position position{ptr<float>(cos) + r * width, ptr<float>(sin) + r * width, width, eps};
      for (int64_t h = 0; h < heads; ++h, x += width) {
        position.turn(x, ptr<float>(query_norm), queries + (at[r] * heads + h) * width);
      }
      const int64_t last = ends[at[r]] - 1;
      for (int64_t h = 0; h < key_heads; ++h, x += width) {
        position.turn(x, ptr<float>(key_norm), keys.at(at[r], h, last));
      }
      for (int64_t h = 0; h < key_heads; ++h, x += width) {
        std::memcpy(values.at(at[r], h, last), x, width * sizeof(float));
      }
    }
  });
  const Tensor output = std::get<0>(decode<float>(a, call, kernels().decode_f32));
  const int64_t size = heads * width;
  const Tensor of_rows = empty_cpu({count, size}, ScalarType::Float);
  for (int64_t r = 0; r < count; ++r) {
    std::memcpy(mutable_ptr<float>(of_rows) + r * size, ptr<float>(output) + at[r] * size,
                size * sizeof(float));
  }
  return of_rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) {
  m.impl("decode_attention_step", TORCH_BOX(&decode_attention_step_cpu));
}

}  // namespace fastrl
