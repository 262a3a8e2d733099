#include "kernels.h"

#if defined(__x86_64__)
#define FASTRL_SIMD avx2
#define FASTRL_LANES 8
#define FASTRL_TARGET "avx2,fma"
#include "kernels_target.h"
#endif

namespace fastrl {

const KernelTable* kernels_avx2() {
#if defined(__x86_64__)
  return &avx2::kTable;
#else
  return nullptr;
#endif
}

}  // namespace fastrl
