// What the two passes of attention on the CPU share: tensors as the kernels take them, and threads.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_trees.h"
#include "heads.h"
#include "kernels.h"
#include "tensors.h"

namespace fastrl {

// In memory order [B, T, H, D], as models have it.
inline Tensor token_major(const Tensor& like) {
  const std::vector<int64_t> shape = shape_of(like);
  const int64_t heads = shape[1], tokens = shape[2], width = shape[3];
  const int64_t token = heads * width;
  return empty_cpu(shape, {tokens * token, width, token, 1}, like.scalar_type());
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
