// Heads of tokens as the kernels of attention read and write them, and how threads share them.
#pragma once

#include <atomic>
#include <cstdint>

#include "tensors.h"

namespace fastrl {

constexpr int64_t kSmall = 1 << 18;  // products, which take as long as waking a thread

// [B, H, T, D]; a copy where it is not dense along D.
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

inline int64_t threads_for(int64_t count, bool alone) {
  return alone ? 1 : std::min<int64_t>(count, torch::stable::get_num_threads());
}

// Hands out 0, 1, 2, ...; what is ordered by that alone is in no order.
class Tickets {
 public:
  int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> next_{0};
};

// body(next, worker): a worker takes what comes next until `count` is reached. Who takes what
// changes no bit of it.
template <class Body>
void share(int64_t count, bool alone, Body body) {
  Tickets next;
  torch::stable::parallel_for(0, threads_for(count, alone), 1,
                              [&](int64_t worker, int64_t) { body(next, worker); });
}

}  // namespace fastrl
