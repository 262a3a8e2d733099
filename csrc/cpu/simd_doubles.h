// Vectors of doubles: loads from and stores to each dtype, neighbours, exp. Included after simd.h,
// inside the same target region.

namespace fastrl::FASTRL_SIMD {

typedef uint16_t VecQuarterU __attribute__((vector_size(FASTRL_LANES)));
typedef uint8_t VecEighthU __attribute__((vector_size(FASTRL_LANES / 2)));

constexpr double kLog2E = 1.4426950408889634;

FASTRL_INLINE VecD splat_double(double x) { return x - VecD{}; }

// GCC takes two halves for 512 bits.
FASTRL_INLINE VecD widen(VecHalfF v) {
#if defined(__x86_64__) && FASTRL_LANES == 16
  return bit_cast<VecD>(_mm512_cvtps_pd(bit_cast<__m256>(v)));
#else
  return __builtin_convertvector(v, VecD);
#endif
}

FASTRL_INLINE VecD load_doubles(const float* p) {
  VecHalfF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return widen(v);
}
FASTRL_INLINE VecD load_doubles(const double* p) {
  VecD v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
FASTRL_INLINE VecHalfU load_sixteen_bits(const void* p) {
  VecQuarterU v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, VecHalfU);
}
FASTRL_INLINE VecD load_doubles(const BFloat16* p) {
  return widen(bit_cast<VecHalfF>(load_sixteen_bits(p) << 16));
}
FASTRL_INLINE VecD load_doubles(const Half* p) {
  const VecHalfU bits = load_sixteen_bits(p);
  const VecHalfU magnitude = (bits & 0x7fffu) << 13;  // as load(const Half*) does
  const VecHalfF scaled = bit_cast<VecHalfF>(magnitude) * 0x1p112f;
  const VecHalfU special = magnitude | 0x7f800000u;
  const VecHalfU value = magnitude >= 0x0f800000u ? special : bit_cast<VecHalfU>(scaled);
  return widen(bit_cast<VecHalfF>(value | ((bits & 0x8000u) << 16)));
}
// All bits set where a bool is true. GCC takes a bool at a time for its own conversion.
FASTRL_INLINE VecL load_flags(const uint8_t* p) {
#if defined(__x86_64__) && FASTRL_LANES == 16
  const __m512i wide = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return bit_cast<VecL>(wide) != 0;
#elif defined(__x86_64__) && FASTRL_LANES == 8
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return bit_cast<VecL>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four))) != 0;
#else
  VecEighthU v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, VecL) != 0;
#endif
}

FASTRL_INLINE void store_doubles(float* p, VecD v) {
  const VecHalfF narrow = __builtin_convertvector(v, VecHalfF);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}
FASTRL_INLINE void store_doubles(double* p, VecD v) { __builtin_memcpy(p, &v, sizeof(v)); }

FASTRL_INLINE bool all_finite(VecD v) {
#if defined(__x86_64__) && FASTRL_LANES == 16
  return _mm512_fpclass_pd_mask(bit_cast<__m512d>(v), 0x99) == 0;  // NaN or infinite
#elif defined(__x86_64__) && FASTRL_LANES == 8
  return _mm256_movemask_pd(bit_cast<__m256d>(v - v == 0.0)) == 15;
#elif defined(__x86_64__)
  return _mm_movemask_pd(bit_cast<__m128d>(v - v == 0.0)) == 3;
#else
  VecL finite = v - v == 0.0;
  bool all = true;
  for (int l = 0; l < kDoubles; ++l) all &= finite[l] != 0;
  return all;
#endif
}

// Lane i of the result is lane i + S of v, S of either sign; what moves in comes from `beyond`:
// from its first lanes at the end, from its last lanes at the beginning.
template <int S, class V, int... I>
FASTRL_INLINE V neighbour(V v, V beyond, std::integer_sequence<int, I...>) {
#ifdef __clang__
  if constexpr (S > 0) return __builtin_shufflevector(v, beyond, (I + S)...);
  return __builtin_shufflevector(beyond, v, (I + kDoubles + S)...);
#else
  if constexpr (S > 0) return __builtin_shuffle(v, beyond, VecL{(I + S)...});
  return __builtin_shuffle(beyond, v, VecL{(I + kDoubles + S)...});
#endif
}
template <int S, class V>
FASTRL_INLINE V neighbour(V v, V beyond) {
#if defined(__x86_64__) && FASTRL_LANES == 16
  const __m512i low = bit_cast<__m512i>(S > 0 ? v : beyond);
  const __m512i high = bit_cast<__m512i>(S > 0 ? beyond : v);
  return bit_cast<V>(_mm512_alignr_epi64(high, low, S > 0 ? S : kDoubles + S));
#endif
  return neighbour<S>(v, beyond, std::make_integer_sequence<int, kDoubles>());
}

// exp by Taylor's series of exp(f), |f| <= ln(2) / 2, to 2e-16 relative; to 1e-10 where the
// argument was no double. inf above 709.8, 0 below -745.2, where the double's own range ends; NaN
// stays.
template <bool kDouble>
FASTRL_INLINE VecD exp_doubles(VecD x) {
#if defined(__x86_64__) && FASTRL_LANES == 16
  // The second operand wins with NaN.
  const __m512d low = _mm512_max_pd(_mm512_set1_pd(-1000.0), bit_cast<__m512d>(x));
  const VecD clamped = bit_cast<VecD>(_mm512_min_pd(_mm512_set1_pd(1000.0), low));
  const VecD n = bit_cast<VecD>(_mm512_roundscale_pd(bit_cast<__m512d>(clamped * kLog2E), 0));
#else
  constexpr double kRound = 0x1.8p52;  // adding it rounds to a whole number in the low bits
  const VecD clamped = x > 1000.0 ? VecD{} + 1000.0 : x < -1000.0 ? VecD{} - 1000.0 : x;
  const VecD t = clamped * kLog2E + kRound;
  const VecD n = t - kRound;
#endif
  VecD f = clamped - n * 0x1.62e42fefa0000p-1;
  f -= n * 0x1.cf79abc9e3b3ap-40;
  // 1, 1, 1 / 2!, ..., 1 / 7! in pairs, for a short chain.
  const VecD f2 = f * f;
  const VecD low4 = (f + 1.0) + (f * 0.16666666666666666 + 0.5) * f2;
  const VecD mid4 = (f * 0.008333333333333333 + 0.041666666666666664) +
                    (f * 0.0001984126984126984 + 0.001388888888888889) * f2;
  VecD rest = mid4;
  if constexpr (kDouble) {
    VecD high = 1.6059043836821613e-10 * f + 2.08767569878681e-09;  // 1 / 13!, 1 / 12!
    high = high * f + 2.505210838544172e-08;
    high = high * f + 2.755731922398589e-07;
    high = high * f + 2.7557319223985893e-06;
    high = high * f + 2.48015873015873e-05;
    rest += high * (f2 * f2);
  }
  const VecD p = low4 + rest * (f2 * f2);
#if defined(__x86_64__) && FASTRL_LANES == 16
  return bit_cast<VecD>(_mm512_scalef_pd(bit_cast<__m512d>(p), bit_cast<__m512d>(n)));
#else
  // In two factors: n runs from -1443 to 1443, and a double's exponent from -1022 to 1023.
  const VecL whole = bit_cast<VecL>(t) - bit_cast<VecL>(splat_double(kRound));
  const VecL half = whole >> 1;
  const VecD low = bit_cast<VecD>((half + 1023) << 52);
  const VecD high = bit_cast<VecD>((whole - half + 1023) << 52);
  return p * low * high;
#endif
}

}  // namespace fastrl::FASTRL_SIMD
