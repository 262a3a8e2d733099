// Fresh memory of hundreds of megabytes costs more in page faults than in arithmetic: ask for 2 MB
// pages where the system gives them on request. A hint: nothing depends on its being granted.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastrl {

inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // What malloc always maps anew. Smaller blocks it hands out again, pages and all: advice costs
  // there, and gains nothing.
  constexpr size_t kAlwaysFresh = size_t{32} << 20;
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (bytes <= kAlwaysFresh) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fastrl
