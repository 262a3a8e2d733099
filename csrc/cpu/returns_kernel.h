// The scan of the returns on a CPU, around the estimators of ../estimators.h. Included by
// kernels_*.cpp after returns_steps.h, once per instruction set.
//
// Steps are taken kDoubles at a time. Of a row in memory they are the lanes of a vector: (a, b) are
// composed across the lanes in log2 steps, and the chain from one vector to the next is a single
// multiply-add. Of rows side by side in memory (time_major) the lanes are rows, and the same
// compositions in the same order run over kDoubles vectors: a row gives the same bits either way.

namespace fastrl::FASTRL_SIMD {

// b + a x, and a's product with a further factor. Where kGuarded a factor of 0 cuts: what follows
// is not looked at, be it infinite. That costs half as much again, so a vector is done without
// first, and again where what came out is not finite; on finite numbers both give the same bits.
template <bool kGuarded>
FASTRL_INLINE VecD apply(VecD a, VecD b, VecD x) {
  const VecD sum = multiply_add(a, x, b);
  return kGuarded ? (a == 0.0 ? b : sum) : sum;
}
// A product of many factors leaves the range of a double where the sums that it weighs need not: it
// stops at these ends, so that it cuts where a factor is 0 and nowhere else, and times 0 stays 0.
constexpr double kLeastFactor = 1e-250, kMostFactor = 1e300;

FASTRL_INLINE VecD within_range(VecD product) {
#if defined(__x86_64__) && FASTRL_LANES == 16
  // Of max and min the second operand wins with NaN. GCC makes two instructions of each otherwise.
  const __m512d most = _mm512_set1_pd(kMostFactor), least = _mm512_set1_pd(kLeastFactor);
  return bit_cast<VecD>(_mm512_min_pd(most, _mm512_max_pd(least, bit_cast<__m512d>(product))));
#else
  product = product < kLeastFactor ? VecD{} + kLeastFactor : product;
  return product > kMostFactor ? VecD{} + kMostFactor : product;
#endif
}
template <bool kGuarded>
FASTRL_INLINE VecD further(VecD a, VecD next) {
  if constexpr (!kGuarded) return a * next;
  const VecL cut = (a == 0.0) | (next == 0.0);
  return cut ? VecD{} : within_range(a * next);
}

// What the scan of a row, or of kDoubles rows side by side, carries from vector to vector.
struct Carry {
  VecD a = VecD{} + 1.0, b = {};  // of the chunk so far
  VecD x = {};                    // before the chunk
  VecD later = {};                // values of the steps before these in the scan
  VecD least = VecD{} + 1.0;      // of the factors, where they are noted

  template <bool kGuarded>
  FASTRL_INLINE VecD before() const {
    return apply<kGuarded>(a, b, x);
  }
  template <bool kGuarded>
  FASTRL_INLINE void add(VecD last_a, VecD last_b) {
    b = apply<kGuarded>(last_a, last_b, b);
    a = further<true>(last_a, a);  // over a whole chunk: many factors
  }
  // The product of factors of which none is 0 may be too small for a double. While x is not known,
  // which may be infinite, that is no cut.
  FASTRL_INLINE void note(VecD factors) { least = factors < least ? factors : least; }
  void next_chunk() {
    x = before<true>();
    a = VecD{} + 1.0;
    b = VecD{};
  }
};

template <class E>
constexpr int kStepBack = E::kForwardInTime ? -1 : 1;  // to the lane before in the scan

// (a, b) of each lane composed with those before it in the scan, S lanes at a time.
template <class E, bool kGuarded, int S = 1>
FASTRL_INLINE void compose_lanes(VecD& a, VecD& b) {
  if constexpr (S < kDoubles) {
    constexpr int kShift = S * kStepBack<E>;
    b = apply<kGuarded>(a, b, neighbour<kShift>(b, VecD{}));
    a = further<kGuarded>(a, neighbour<kShift>(a, VecD{} + 1.0));
    compose_lanes<E, kGuarded, 2 * S>(a, b);
  }
}
// The same over vectors, lane i of the above being vector i here.
template <class E, bool kGuarded, int S = 1>
FASTRL_INLINE void compose_vectors(VecD (&a)[kDoubles], VecD (&b)[kDoubles]) {
  if constexpr (S < kDoubles) {
    for (int k = 0; k < kDoubles; ++k) {
      const int i = E::kForwardInTime ? kDoubles - 1 - k : k;
      const int j = i + S * kStepBack<E>;
      const bool exists = j >= 0 && j < kDoubles;
      b[i] = apply<kGuarded>(a[i], b[i], exists ? b[j] : VecD{});
      if (exists) a[i] = further<kGuarded>(a[i], a[j]);
    }
    compose_vectors<E, kGuarded, 2 * S>(a, b);
  }
}

// Each lane's value, or that of the nearest lane before it in the scan that exists; `later` has
// been through this already.
template <class E, int S = 1>
FASTRL_INLINE VecD fill(VecD v, VecL exists, VecD later) {
  if constexpr (S < kDoubles) {
    constexpr int kShift = S * kStepBack<E>;
    v = exists ? v : neighbour<kShift>(v, later);
    exists |= neighbour<kShift>(exists, VecL{});
    return fill<E, 2 * S>(v, exists, later);
  }
  return exists ? v : splat_double(later[E::kForwardInTime ? kDoubles - 1 : 0]);
}

template <class E>
constexpr bool kLooksAhead = (E::kReads & kNextValue) != 0;

template <class E, bool kAll, class At>
FASTRL_INLINE void store_results(const Trajectories& row, const At& at, const Present& in,
                                 const typename E::template Formed<Lanes>& formed, VecL exists,
                                 VecD x, VecD x_before) {
  VecD out[E::kOutputs];
  E::write(formed, x, x_before, out);
  for (int k = 0; k < E::kOutputs; ++k) {
    const Results& r = row.results[k];
    if (k >= E::kAlways && !r.data) continue;
    const VecD kept = row.mask.data ? (exists ? out[k] : VecD{}) : out[k];
    store<kAll>(r, at.in(r), kept, in);
  }
}

template <class E>
constexpr int kLast = E::kForwardInTime ? kDoubles - 1 : 0;  // lane of the scan

// kDoubles steps of one row composed, and x of each and of the one before it; false if that is not
// finite, and then carry is as before.
template <class E, bool kGuarded>
FASTRL_INLINE bool solve_lanes(VecD a, VecD b, Carry& carry, VecD& x, VecD& x_before) {
  compose_lanes<E, kGuarded>(a, b);
  const VecD before = carry.before<kGuarded>();
  x = apply<kGuarded>(a, b, before);
  if (!kGuarded && !all_finite(x)) return false;
  x_before = neighbour<kStepBack<E>>(x, before);
  carry.add<kGuarded>(splat_double(a[kLast<E>]), splat_double(b[kLast<E>]));
  return true;
}

// kDoubles steps of one row, the first of them t.
template <class E, bool kAll, bool kWrite>
FASTRL_INLINE void scan_lanes(const Trajectories& row, int64_t t, const Present& in,
                              const Clips& clips, Carry& carry, const VecD* ratio = nullptr) {
  const Place<false> at{t, 0};
  Step<Lanes> s = load_step<E, kAll>(row, at, in, ratio);
  const bool some_missing = !kAll || row.mask.data;
  const VecL exists = load_actions<kAll>(row, at, in);
  if constexpr (kLooksAhead<E>) {
    if (!row.next_values.data) {
      const VecD v = some_missing ? fill<E>(s.value, exists, carry.later) : s.value;
      s.next_value = neighbour<kStepBack<E>>(v, carry.later);
      carry.later = v;
    }
  }
  const auto formed = E::form(s, clips);
  VecD a = formed.a, b = formed.b, x, x_before;
  if (some_missing) {
    a = exists ? a : 1.0;
    b = exists ? b : 0.0;
  }
  if constexpr (!kWrite) carry.note(a);
  if (__builtin_expect(!solve_lanes<E, false>(a, b, carry, x, x_before), false)) {
    solve_lanes<E, true>(a, b, carry, x, x_before);
  }
  if constexpr (kWrite) store_results<E, kAll>(row, at, in, formed, exists, x, x_before);
}

// The same for kDoubles rows side by side. A function of its own: inlined, its registers and those
// of an estimator with many numbers (vtrace) push each other to the stack, in twice the time.
template <class E, bool kGuarded>
__attribute__((noinline)) bool solve_vectors(const VecD (&given_a)[kDoubles],
                                             const VecD (&given_b)[kDoubles], Carry& carry,
                                             VecD (&x)[kDoubles], VecD& before) {
  VecD a[kDoubles], b[kDoubles];
  for (int i = 0; i < kDoubles; ++i) a[i] = given_a[i], b[i] = given_b[i];
  compose_vectors<E, kGuarded>(a, b);
  before = carry.before<kGuarded>();
  VecD all = {};
  for (int i = 0; i < kDoubles; ++i) {
    x[i] = apply<kGuarded>(a[i], b[i], before);
    all += x[i] - x[i];  // 0, or NaN where one is not finite
  }
  if (!kGuarded && !all_finite(all)) return false;
  carry.add<kGuarded>(a[kLast<E>], b[kLast<E>]);
  return true;
}

// kDoubles rows side by side, from row `lane` on: steps t to t + kDoubles, of which those of
// `steps` exist.
template <class E, bool kAll, bool kWrite>
FASTRL_INLINE void scan_vectors(const Trajectories& rows, int64_t t, int64_t lane,
                                const Present& steps, const Present& in, const Clips& clips,
                                Carry& carry) {
  typename E::template Formed<Lanes> formed[kDoubles];
  VecD a[kDoubles], b[kDoubles], x[kDoubles], before;
  VecL exists[kDoubles];
  for (int k = 0; k < kDoubles; ++k) {
    const int i = E::kForwardInTime ? k : kDoubles - 1 - k;
    a[i] = VecD{} + 1.0;
    b[i] = VecD{};
    if (i < steps.first || i >= steps.first + steps.count) {
      formed[i] = typename E::template Formed<Lanes>{};
      continue;
    }
    const Place<true> at{t + i, lane};
    Step<Lanes> s = load_step<E, kAll>(rows, at, in);
    exists[i] = load_actions<kAll>(rows, at, in);
    if constexpr (kLooksAhead<E>) {
      if (!rows.next_values.data) {
        s.next_value = carry.later;
        carry.later = exists[i] ? s.value : carry.later;
      }
    }
    formed[i] = E::form(s, clips);
    a[i] = exists[i] ? formed[i].a : a[i];
    b[i] = exists[i] ? formed[i].b : b[i];
  }
  if constexpr (!kWrite) {
    for (const VecD& factors : a) carry.note(factors);
  }
  if (__builtin_expect(!solve_vectors<E, false>(a, b, carry, x, before), false)) {
    solve_vectors<E, true>(a, b, carry, x, before);
  }
  if constexpr (!kWrite) return;
  for (int i = steps.first; i < steps.first + steps.count; ++i) {
    const int j = i + kStepBack<E>;
    const VecD x_before = j < 0 || j >= kDoubles ? before : x[j];
    store_results<E, kAll>(rows, Place<true>{t + i, lane}, in, formed[i], exists[i], x[i],
                           x_before);
  }
}

}  // namespace fastrl::FASTRL_SIMD
