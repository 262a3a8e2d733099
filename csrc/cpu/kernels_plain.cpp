// Whatever the compiler builds for by default: SSE2 on x86-64, NEON on 64-bit ARM.
#include "kernels.h"

#define FASTRL_SIMD plain
#define FASTRL_LANES 4
#include "kernels_target.h"

namespace fastrl {

const KernelTable* kernels_plain() { return &plain::kTable; }

}  // namespace fastrl
