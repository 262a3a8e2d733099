// torch's parallel_for on threads that a sanitizer sees from their start to their end, where it
// knows nothing of the barriers of OpenMP. Preloaded, it stands before torch's own.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <thread>
#include <utility>
#include <vector>

namespace {

thread_local bool inside = false;
thread_local uint32_t index_inside = 0;

uint32_t num_threads() {
  static const uint32_t count = std::atoi(std::getenv("THREADS"));
  return inside ? 1 : count;
}

}  // namespace

extern "C" {

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc body,
                                  void* context) {
  const int64_t pieces = std::max<int64_t>(end - begin, 0) / std::max<int64_t>(grain, 1);
  const int64_t wanted = std::clamp<int64_t>(pieces, 1, num_threads());
  const int64_t size = (end - begin + wanted - 1) / wanted;
  if (begin >= end) return 0;
  const int64_t count = (end - begin + size - 1) / size;
  // All begin before one goes on: or one would be through before another is there.
  std::atomic<int64_t> ready{0};
  const auto run = [&](int64_t i) {
    ready.fetch_add(1, std::memory_order_relaxed);
    while (ready.load(std::memory_order_relaxed) < count) std::this_thread::yield();
    const bool was_inside = std::exchange(inside, true);
    const uint32_t was_index = std::exchange(index_inside, static_cast<uint32_t>(i));
    body(begin + i * size, std::min(end, begin + (i + 1) * size), context);
    inside = was_inside, index_inside = was_index;
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < count; ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& other : others) other.join();
  return 0;
}

AOTITorchError torch_get_num_threads(uint32_t* out) {
  *out = num_threads();
  return 0;
}

AOTITorchError torch_get_thread_idx(uint32_t* out) {
  *out = index_inside;
  return 0;
}

}  // extern "C"
