// Vectors of floats in the compiler's own portable notation, at the width of one instruction set.
//
// Included once per instruction set (see kernels_*.cpp), inside that set's namespace and target
// region: it must therefore include nothing itself. Lane order and the order of every sum are fixed
// here and not left to the auto-vectoriser, so that a row gives the same bits at any address.
#ifndef FASTRL_SIMD
#error "include simd.h from a kernels_*.cpp, which defines FASTRL_SIMD and FASTRL_LANES"
#endif

namespace fastrl::FASTRL_SIMD {

constexpr int kLanes = FASTRL_LANES;
typedef float VecF __attribute__((vector_size(4 * FASTRL_LANES)));
typedef int32_t VecI __attribute__((vector_size(4 * FASTRL_LANES)));
typedef uint32_t VecU __attribute__((vector_size(4 * FASTRL_LANES)));
typedef uint16_t VecU16 __attribute__((vector_size(2 * FASTRL_LANES)));

// Doubles: half as many lanes in the same registers.
constexpr int kDoubles = FASTRL_LANES / 2;
typedef double VecD __attribute__((vector_size(4 * FASTRL_LANES)));
typedef int64_t VecL __attribute__((vector_size(4 * FASTRL_LANES)));
typedef float VecHalfF __attribute__((vector_size(2 * FASTRL_LANES)));
typedef uint32_t VecHalfU __attribute__((vector_size(2 * FASTRL_LANES)));

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

inline VecF splat(float x) { return x - VecF{}; }
// a > b ? a : b, so with NaN the second operand wins: max(x, m) skips NaN, at_least(d, lo) keeps
// it. GCC makes a comparison and a blend of that, which take twice as long as the one instruction.
inline VecF max(VecF a, VecF b) {
#if defined(__x86_64__) && FASTRL_LANES == 16
  return bit_cast<VecF>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__x86_64__) && FASTRL_LANES == 8
  return bit_cast<VecF>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#elif defined(__x86_64__)
  return bit_cast<VecF>(_mm_max_ps(bit_cast<__m128>(a), bit_cast<__m128>(b)));
#else
  return a > b ? a : b;
#endif
}
inline VecF at_least(VecF d, VecF lo) { return max(lo, d); }

inline VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof(v)); }

// Past the caches: memory that is written in full and not read soon need not be read first. p must
// be aligned to the vector.
inline void stream(float* p, VecF v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<VecF*>(p));
#elif defined(__x86_64__) && FASTRL_LANES == 16
  _mm512_stream_ps(p, bit_cast<__m512>(v));
#elif defined(__x86_64__) && FASTRL_LANES == 8
  _mm256_stream_ps(p, bit_cast<__m256>(v));
#elif defined(__x86_64__)
  _mm_stream_ps(p, bit_cast<__m128>(v));
#else
  store(p, v);
#endif
}
inline void end_of_stream() {
#if defined(__x86_64__)
  _mm_sfence();  // streamed stores are not ordered with those that follow
#endif
}

inline VecU load_u16(const void* p) {
  VecU16 v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, VecU);
}
inline void store_u16(void* p, VecU v) {
  const VecU16 narrow = __builtin_convertvector(v, VecU16);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}

inline VecF load(const BFloat16* p) { return bit_cast<VecF>(load_u16(p) << 16); }
inline void store(BFloat16* p, VecF v) {
  const VecU bits = bit_cast<VecU>(v);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  store_u16(p, v == v ? rounded : VecU{} + 0x7fc0u);
}

// Half precision through integers: F16C is no part of every instruction set that we build for.
inline VecF load(const Half* p) {
  const VecU bits = load_u16(p);
  const VecU magnitude = (bits & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias from 15 to 127 and turns subnormal halves into normal floats.
  const VecF scaled = bit_cast<VecF>(magnitude) * 0x1p112f;
  const VecU special = magnitude | 0x7f800000u;
  const VecU value = magnitude >= 0x0f800000u ? special : bit_cast<VecU>(scaled);
  return bit_cast<VecF>(value | ((bits & 0x8000u) << 16));
}
inline void store(Half* p, VecF v) {
  const VecU bits = bit_cast<VecU>(v);
  const VecU sign = (bits >> 16) & 0x8000u;
  const VecU magnitude = bits & 0x7fffffffu;
  const VecU normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2 aligns a subnormal half with the last bits of the float, and the sum rounds it.
  const VecU subnormal = bit_cast<VecU>(bit_cast<VecF>(magnitude) + 0.5f) - 0x3f000000u;
  VecU half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? VecU{} + 0x7c00u : half;  // 65520 and more round to infinity
  half = magnitude > 0x7f800000u ? VecU{} + 0x7e00u : half;
  store_u16(p, half | sign);
}

// What is left of scale * log2(e) in float32 may be dropped where it moves no digit: 1.3e-8 of it
// at a temperature that is a power of two.
inline bool needs_low_part(double scale) {
  const double log2e_scale = scale * 1.4426950408889634;
  const float high = static_cast<float>(log2e_scale);
  return std::fabs(log2e_scale - high) > 1.5e-8 * log2e_scale;
}

// exp(scale * d) for d <= 0: 2^n * 2^f with n whole and |f| <= 1/2, to 1.5e-7 relative. kLow false
// leaves the low part of scale * log2(e) out. Below 2^-127 it is 0, on AVX-512 without the low part
// below 2^-150.
template <bool kLow>
struct ExpOf {
  static constexpr bool kScalesByOneInstruction = !kLow && FASTRL_LANES == 16;
  VecF lowest, hi, lo;

  explicit ExpOf(double scale) {
    const double log2e_scale = std::fmin(scale * 1.4426950408889634, 1e38);
    const float high = static_cast<float>(log2e_scale);
    hi = splat(high);
    lo = splat(static_cast<float>(log2e_scale - high));
    const double least = (kScalesByOneInstruction ? -160.0 : -127.0) / log2e_scale;
    lowest = splat(static_cast<float>(std::fmax(least, -3.4e38)));
  }

  // Clamped so that exp() stays finite inside, -inf included, and is exactly 0 there; keeps NaN.
  VecF clamp(VecF d) const { return at_least(d, lowest); }

  VecF operator()(VecF clamped) const {
#if defined(__x86_64__) && FASTRL_LANES == 16
    if constexpr (kScalesByOneInstruction) {
      const __m512 n = _mm512_roundscale_ps(bit_cast<__m512>(clamped * hi), 0);  // to nearest
      const VecF p = power(clamped, bit_cast<VecF>(n));
      return bit_cast<VecF>(_mm512_scalef_ps(bit_cast<__m512>(p), n));
    }
#endif
    // Adding 1.5 * 2^23 rounds to a whole number in the low bits; 127 more is float's bias.
    constexpr float kRound = 12582912.0f + 127.0f;
    const VecF t = clamped * hi + kRound;
    const VecF p = power(clamped, t - kRound);
    return p * bit_cast<VecF>(bit_cast<VecI>(t) << 23);  // n = -127 gives a factor of exactly 0
  }

  // 2^f
  VecF power(VecF clamped, VecF n) const {
    VecF f = clamped * hi - n;
    if constexpr (kLow) f = clamped * lo + f;
    VecF p = 0.0013390863f * f + 0.0096760319f;  // minimax on [-1/2, 1/2], 8e-8
    p = p * f + 0.0555035711f;
    p = p * f + 0.2402210749f;
    p = p * f + 0.6931471880f;
    return p * f + 1.0f;
  }
};
using ScaledExp = ExpOf<true>;

// A lane of doubles for each lane of floats: what many blocks add up to.
struct WideSum {
  VecD low = {}, high = {};

  void add(VecF v) {
    VecHalfF halves[2];
    __builtin_memcpy(halves, &v, sizeof(v));
    low += __builtin_convertvector(halves[0], VecD);
    high += __builtin_convertvector(halves[1], VecD);
  }
  double total() const {
    const VecD both = low + high;
    double sum = 0.0;
    for (int l = 0; l < kDoubles; ++l) sum += both[l];
    return sum;
  }
};

inline float max_lane(VecF v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l)
      lanes[l] = lanes[l] > lanes[l + width] ? lanes[l] : lanes[l + width];
  }
  return lanes[0];
}

}  // namespace fastrl::FASTRL_SIMD
