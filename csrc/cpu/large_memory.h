// Memory for tensors of megabytes. malloc maps it anew again and again, and the system zeroes it
// page by page, which costs more than computing what goes into it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastrl {

constexpr size_t kLarge = size_t{4} << 20;

// An uninitialised tensor on the CPU in 2 MB pages, those of such a tensor that was freed if they
// are about as many. An undefined tensor where this system or this torch cannot do that.
torch::stable::Tensor large_empty(const std::vector<int64_t>& shape,
                                  const std::vector<int64_t>& strides, int32_t dtype, size_t bytes);

// Gives the pages of freed tensors back to the system now.
void release_memory();

}  // namespace fastrl
