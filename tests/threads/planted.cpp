// Two threads that write the same number, or one each.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

extern "C" {

int64_t numbers[2];

void write_numbers(bool same) {
  torch::stable::parallel_for(0, 2, 1, [&](int64_t i, int64_t) { numbers[same ? 0 : i] = 1; });
}

}  // extern "C"
