// Vectors of doubles: loads from and stores to each dtype, neighbours, exp. Included after simd.h,
// inside the same target region.

namespace fastrl::FASTRL_SIMD {

typedef uint16_t VecQuarterU __attribute__((vector_size(FASTRL_LANES)));
typedef uint8_t VecEighthU __attribute__((vector_size(FASTRL_LANES / 2)));

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
FASTRL_INLINE VecHalfF load_floats(const float* p) {
  VecHalfF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
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

// a x + b, rounded once where the machine can. Whether GCC contracts an expression depends on where
// in a kernel it stands (it looks no further than a basic block), and so would a row's bits.
FASTRL_INLINE VecD multiply_add(VecD a, VecD x, VecD b) {
#if defined(__x86_64__) && FASTRL_LANES == 16
  return bit_cast<VecD>(
      _mm512_fmadd_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(x), bit_cast<__m512d>(b)));
#elif defined(__x86_64__) && FASTRL_LANES == 8
  return bit_cast<VecD>(
      _mm256_fmadd_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(x), bit_cast<__m256d>(b)));
#elif defined(__FP_FAST_FMA)
  for (int l = 0; l < kDoubles; ++l) b[l] = __builtin_fma(a[l], x[l], b[l]);
  return b;
#else
  return a * x + b;
#endif
}

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

// All bits of a lane set are a NaN.
FASTRL_INLINE bool any(VecL lanes) { return !all_finite(bit_cast<VecD>(lanes)); }

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

// exp by Taylor's series of exp(f), |f| <= ln(2) / 2, to 4e-16 relative. inf above 709.8, 0 below
// -745.2, where the double's own range ends; NaN stays.
FASTRL_INLINE VecD exp_doubles(VecD x) {
  constexpr double kRound = 0x1.8p52;  // adding it rounds to a whole number in the low bits
  const VecD clamped = x > 1000.0 ? VecD{} + 1000.0 : x < -1000.0 ? VecD{} - 1000.0 : x;
  const VecD t = clamped * 1.4426950408889634 + kRound;
  const VecD n = t - kRound;
  VecD f = clamped - n * 0x1.62e42fefa0000p-1;
  f -= n * 0x1.cf79abc9e3b3ap-40;
  VecD p = 1.6059043836821613e-10 * f + 2.08767569878681e-09;  // 1 / 13!, 1 / 12!
  p = p * f + 2.505210838544172e-08;
  p = p * f + 2.755731922398589e-07;
  p = p * f + 2.7557319223985893e-06;
  p = p * f + 2.48015873015873e-05;
  p = p * f + 0.0001984126984126984;
  p = p * f + 0.001388888888888889;
  p = p * f + 0.008333333333333333;
  p = p * f + 0.041666666666666664;
  p = p * f + 0.16666666666666666;
  p = p * f + 0.5;
  p = p * f + 1.0;
  p = p * f + 1.0;
  // In two factors: n runs from -1443 to 1443, and a double's exponent from -1022 to 1023.
  const VecL whole = bit_cast<VecL>(t) - bit_cast<VecL>(splat_double(kRound));
  const VecL half = whole >> 1;
  const VecD low = bit_cast<VecD>((half + 1023) << 52);
  const VecD high = bit_cast<VecD>((whole - half + 1023) << 52);
  return p * low * high;
}

// The same of floats, to 8e-8 relative: inf above 88.7, 0 below -103.9.
FASTRL_INLINE VecHalfF exp_floats(VecHalfF x) {
#if defined(__x86_64__) && FASTRL_LANES == 16
  // Of max and min the second operand wins with NaN.
  const __m256 above = _mm256_max_ps(_mm256_set1_ps(-120.0f), bit_cast<__m256>(x));
  const VecHalfF clamped = bit_cast<VecHalfF>(_mm256_min_ps(_mm256_set1_ps(120.0f), above));
  const __m256 scaled = bit_cast<__m256>(clamped * 0x1.715476p+0f);
  const VecHalfF n = bit_cast<VecHalfF>(_mm256_roundscale_ps(scaled, 0));
#else
  constexpr float kRound = 0x1.8p23f;
  const VecHalfF clamped = x > 120.0f ? VecHalfF{} + 120.0f : x < -120.0f ? VecHalfF{} - 120.0f : x;
  const VecHalfF t = clamped * 0x1.715476p+0f + kRound;
  const VecHalfF n = t - kRound;
#endif
  VecHalfF f = clamped - n * 0x1.62e400p-1f;
  f -= n * 0x1.7f7d1cp-20f;
  // In pairs, for a short chain; what is near 1 comes last.
  const VecHalfF f2 = f * f;
  const VecHalfF high =
      (0.0001984127f * f + 0.0013888889f) * f2 + (0.0083333333f * f + 0.0416666667f);
  const VecHalfF p = ((high * f2 + (0.1666666667f * f + 0.5f)) * f2 + f) + 1.0f;
#if defined(__x86_64__) && FASTRL_LANES == 16
  return bit_cast<VecHalfF>(_mm256_scalef_ps(bit_cast<__m256>(p), bit_cast<__m256>(n)));
#else
  typedef int32_t VecHalfI __attribute__((vector_size(2 * FASTRL_LANES)));
  const VecHalfI whole = bit_cast<VecHalfI>(t) - bit_cast<VecHalfI>(kRound - VecHalfF{});
  const VecHalfI half = whole >> 1;
  const VecHalfF lower = bit_cast<VecHalfF>((half + 127) << 23);
  const VecHalfF upper = bit_cast<VecHalfF>((whole - half + 127) << 23);
  return p * lower * upper;
#endif
}

}  // namespace fastrl::FASTRL_SIMD
