// The kernels for one instruction set, FASTRL_TARGET (or the compiler's default without it).
//
// Standard headers come first, outside the target region: an inline function of theirs compiled
// here for AVX-512 could be the copy that the linker keeps for the whole module.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define FASTRL_STRING(x) #x
#define FASTRL_NAME(x) FASTRL_STRING(x)
#define FASTRL_PRAGMA(x) _Pragma(#x)

#ifdef FASTRL_TARGET
#ifdef __clang__
#define FASTRL_ATTRIBUTE(t) \
  FASTRL_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
FASTRL_ATTRIBUTE(FASTRL_TARGET)
#else
#define FASTRL_GCC_TARGET(t) FASTRL_PRAGMA(GCC target(t))
#pragma GCC push_options
FASTRL_GCC_TARGET(FASTRL_TARGET)
#endif
#endif

// What is inlined by hand is inlined: a vector in a call's arguments would go through memory.
#define FASTRL_INLINE inline __attribute__((always_inline))

// clang-format off: simd.h first
#include "simd.h"
#include "simd_doubles.h"
#define FASTRL_DEVICE_NAMESPACE fastrl::FASTRL_SIMD
#define FASTRL_DEVICE FASTRL_INLINE
#include "../estimators.h"
#include "returns_steps.h"
#include "returns_kernel.h"
#include "returns_pieces.h"
#include "value_grads_kernel.h"
#include "n_step_kernel.h"
#include "token_logprobs_kernel.h"
#include "sample_tokens_kernel.h"
#include "decode_products.h"
#include "decode_attention_kernel.h"
#include "attention_kernel.h"
#include "attention_grad_kernel.h"
// clang-format on

#ifdef FASTRL_TARGET
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace fastrl::FASTRL_SIMD {

const KernelTable kTable = {
    FASTRL_NAME(FASTRL_SIMD), kLogprobs<float>,     kLogprobs<BFloat16>, kLogprobs<Half>,
    kSample<float>,           kSample<BFloat16>,    kSample<Half>,       kDecode<float>,
    kDecode<double>,          kDecode<BFloat16>,    kDecode<Half>,       kAttention<float>,
    kAttention<double>,       kAttention<BFloat16>, kAttention<Half>,    kReturns,
};

}  // namespace fastrl::FASTRL_SIMD
