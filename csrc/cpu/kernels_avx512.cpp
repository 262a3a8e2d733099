#include "kernels.h"

#if defined(__x86_64__)
#define FASTRL_SIMD avx512
#define FASTRL_LANES 16
#define FASTRL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#include "kernels_target.h"
#endif

namespace fastrl {

const KernelTable* kernels_avx512() {
#if defined(__x86_64__)
  return &avx512::kTable;
#else
  return nullptr;
#endif
}

}  // namespace fastrl
