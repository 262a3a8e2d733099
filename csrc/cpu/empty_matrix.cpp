// Memory for the buffers and gradients of ops that are made of products: that of tensors which were
// freed, in large pages, as every output of ours has it.
#include "tensors.h"

namespace fastrl {
namespace {

Tensor empty_matrix_cpu(const Tensor& like, int64_t rows, int64_t columns) {
  return empty_cpu({rows, columns}, like.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, m) { m.impl("empty_matrix", TORCH_BOX(&empty_matrix_cpu)); }

}  // namespace fastrl
