// What the two passes of attention on the CPU share: tensors as the kernels take them, and threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "attention_trees.h"
#include "kernels.h"
#include "tensors.h"

namespace fastrl {

constexpr int64_t kSmall = 1 << 18;  // products, which take as long as waking a thread

// [B, H, T, D], dense along D.
template <class T>
struct Heads {
  Tensor held;
  T* data;
  int64_t row_stride, head_stride, stride;

  explicit Heads(const Tensor& x)
      : held(x.size(3) <= 1 || x.strides()[3] == 1 ? x : torch::stable::contiguous(x)),
        data(mutable_ptr<T>(held)) {
    const auto strides = held.strides();
    row_stride = strides[0], head_stride = strides[1], stride = strides[2];
  }
  T* at(int64_t row, int64_t head, int64_t token) const {
    return data + row * row_stride + head * head_stride + token * stride;
  }
};

// In memory order [B, T, H, D], as models have it.
inline Tensor token_major(const Tensor& like) {
  const std::vector<int64_t> shape = shape_of(like);
  const int64_t heads = shape[1], tokens = shape[2], width = shape[3];
  const int64_t token = heads * width;
  return empty_cpu(shape, {tokens * token, width, token, 1}, like.scalar_type());
}

inline int64_t threads_for(int64_t count, bool alone) {
  return alone ? 1 : std::min<int64_t>(count, torch::stable::get_num_threads());
}

// body(next, worker): a worker takes what comes next until `count` is reached.
template <class Body>
void share(int64_t count, bool alone, Body body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads_for(count, alone), 1,
                              [&](int64_t worker, int64_t) { body(next, worker); });
}

struct Numbers {
  double scale, softcap;
};

inline Sizes sizes_of(const Tensor& query, const Tensor& key, const Tensor& value) {
  const auto is_like = [&](const Tensor& x) {
    return x.dim() == 4 && x.scalar_type() == query.scalar_type() && x.size(0) == query.size(0) &&
           x.size(1) == key.size(1) && x.size(2) == key.size(2) && x.size(3) == query.size(3);
  };
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && is_like(key) && is_like(value) &&
                      key.size(1) > 0 && query.size(1) % key.size(1) == 0,
                  "attention: shapes or dtypes disagree");
  return {query.size(0), query.size(2), key.size(2)};
}

inline int64_t products_of(const std::vector<Tree>& trees, const Tensor& query) {
  int64_t pairs = 0;
  for (const Tree& tree : trees) pairs += tree.pairs();
  return pairs * query.size(1) * query.size(3);
}

// Calls with the kernels of the query's dtype.
template <class Body>
auto with_kernels(const Tensor& query, Body body) {
  const KernelTable& table = kernels();
  switch (query.scalar_type()) {
    case ScalarType::Float:
      return body(table.attention_f32);
    case ScalarType::Double:
      return body(table.attention_f64);
    case ScalarType::BFloat16:
      return body(table.attention_bf16);
    case ScalarType::Half:
      return body(table.attention_f16);
    default:
      STD_TORCH_CHECK(false, "attention: expected a floating-point query");
  }
}

}  // namespace fastrl
