// What sampling asks of a row: masses, a histogram of them, and which ids are kept. The loops, at
// one instruction set's width. Included by kernels_*.cpp after token_logprobs_kernel.h.

namespace fastrl::FASTRL_SIMD {

// At 32 bins a nat, 64 nats below the maximum have bins of their own: float masses end at 88.
constexpr float kBinsPerNat = 32.0f;
constexpr int kGroup = 8;  // vectors that are looked at together before any is looked into

inline bool any_lane(VecI mask) {
  uint64_t words[kLanes / 2], any = 0;
  __builtin_memcpy(words, &mask, sizeof(mask));
  for (const uint64_t word : words) any |= word;
  return any != 0;
}

template <class T>
inline VecF load_tail(const T* x, int64_t n) {
  T tail[kLanes];
  for (int l = 0; l < kLanes; ++l) tail[l] = l < n ? x[l] : kMinusInf<T>;
  return load(tail);
}

// body(v, i): the logits from x[i] on; behind the end they are -inf.
template <class T, class Body>
inline void for_vectors(const T* x, int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(load(x + i), i);
  if (i < n) body(load_tail(x + i, n - i), i);
}

// The same, past the groups in which may_matter(v) holds nowhere: what is rare costs a comparison.
template <class T, class Test, class Body>
inline void for_rare_vectors(const T* x, int64_t n, Test may_matter, Body body) {
  int64_t i = 0;
  for (; i + kGroup * kLanes <= n; i += kGroup * kLanes) {
    VecI any{};
    for (int u = 0; u < kGroup; ++u) any |= may_matter(load(x + i + u * kLanes));
    if (!any_lane(any)) continue;
    for (int u = 0; u < kGroup; ++u) body(load(x + i + u * kLanes), i + u * kLanes);
  }
  for_vectors(x + i, n - i, [&](VecF v, int64_t j) { body(v, i + j); });
}

template <class Take>
inline void for_lanes(VecI mask, Take take) {
  int32_t lanes[kLanes];
  __builtin_memcpy(lanes, &mask, sizeof(mask));
  for (int l = 0; l < kLanes; ++l) {
    if (lanes[l]) take(l);
  }
}

struct KeptTest {
  VecF lowest;
  int64_t last_id;
  VecI lane;

  explicit KeptTest(const Kept& kept)
      : lowest(splat(kept.lowest)),
        last_id(kept.lowest == -__builtin_inff() ? INT64_MIN / 2 : kept.last_id) {
    for (int l = 0; l < kLanes; ++l) lane[l] = l;
  }
  VecI operator()(VecF v, int64_t i) const {
    const int64_t left = last_id - i;
    const int32_t limit = left < 0 ? -1 : left < kLanes ? static_cast<int32_t>(left) : kLanes;
    return (v > lowest) | ((v == lowest) & (lane <= limit));
  }
  VecI possibly(VecF v) const { return v >= lowest; }
};

struct Masses {
  ScaledExp exp;
  VecF max;

  explicit Masses(const RowScale& scale) : exp(1.0 / scale.temperature), max(splat(scale.max)) {}
  VecF operator()(VecF v) const { return exp(exp.clamp(v - max)); }
};

struct BinOf {
  VecF max, per_logit;
  VecI nowhere;  // a bin of its own for each lane: sums into the same one wait for each other

  explicit BinOf(const RowScale& scale)
      : max(splat(scale.max)),
        per_logit(splat(static_cast<float>(std::fmin(kBinsPerNat / scale.temperature, 1e30)))) {
    static_assert(kLanes <= kSpareBins);
    for (int l = 0; l < kLanes; ++l) nowhere[l] = kBins + l;
  }
  VecI operator()(VecF v) const {
    const VecF zero{}, last = zero + float{kBins - 1};
    VecF bin = (max - v) * per_logit;
    bin = bin > zero ? bin : zero;  // NaN too: never a bin that is not there
    bin = bin < last ? bin : last;
    return v == splat(-__builtin_inff()) ? nowhere : __builtin_convertvector(bin, VecI);
  }
};

template <class T>
double kept_block(const T* x, int64_t n, const Kept& kept, const RowScale& scale, float* masses) {
  const KeptTest is_kept(kept);
  const Masses mass(scale);
  WideSum sum;
  for_vectors(x, n, [&](VecF v, int64_t i) {
    const VecF m = is_kept(v, i) ? mass(v) : VecF{};
    store(masses + i, m);
    sum.add(m);
  });
  return sum.total();
}

template <class T>
double kept_mass(const T* x, int64_t n, const Kept& kept, const RowScale& scale) {
  const KeptTest is_kept(kept);
  const Masses mass(scale);
  WideSum sum;
  for_rare_vectors(
      x, n, [&](VecF v) { return is_kept.possibly(v); },
      [&](VecF v, int64_t i) { sum.add(is_kept(v, i) ? mass(v) : VecF{}); });
  return sum.total();
}

template <class T>
void block_maxima(const T* x, int64_t n, float* maxima) {
  for (int64_t start = 0; start < n; start += kSampleBlock) {
    VecF m = splat(-__builtin_inff());
    const int64_t left = n - start;
    for_vectors(x + start, left < kSampleBlock ? left : kSampleBlock,
                [&](VecF v, int64_t) { m = max(v, m); });
    *maxima++ = max_lane(m);
  }
}

template <class T>
void add_to_bins(const T* x, int64_t n, float floor, const RowScale& scale, Bin* bins) {
  typedef double Pair __attribute__((vector_size(16)));  // a bin is one load, sum and store
  static_assert(sizeof(Pair) == sizeof(Bin));
  const Masses mass(scale);
  const BinOf bin_of(scale);
  const VecF low = splat(floor), minus_inf = splat(-__builtin_inff());
  for_rare_vectors(
      x, n, [&](VecF v) { return v >= low; },
      [&](VecF v, int64_t) {
        const VecF counted = v >= low ? v : minus_inf;
        float masses[kLanes];
        int32_t at[kLanes];
        store(masses, mass(counted));
        const VecI bin = bin_of(counted);
        __builtin_memcpy(at, &bin, sizeof(bin));
        for (int l = 0; l < kLanes; ++l) {
          Pair sum;
          __builtin_memcpy(&sum, bins + at[l], sizeof(sum));
          sum += Pair{masses[l], 1.0};
          __builtin_memcpy(bins + at[l], &sum, sizeof(sum));
        }
      });
}

template <class T>
int64_t list_bin(const T* x, int64_t n, const RowScale& scale, int bin, int64_t* ids) {
  const BinOf bin_of(scale);
  const VecI wanted = VecI{} + bin;
  int64_t count = 0;
  for_rare_vectors(
      x, n, [&](VecF v) -> VecI { return bin_of(v) == wanted; },
      [&](VecF v, int64_t i) {
        for_lanes(bin_of(v) == wanted, [&](int l) { ids[count++] = i + l; });
      });
  return count;
}

template <class T>
int64_t count_kept(const T* x, int64_t n, const Kept& kept) {
  const KeptTest is_kept(kept);
  VecI counts{};
  for_vectors(x, n, [&](VecF v, int64_t i) { counts -= is_kept(v, i); });
  int64_t count = 0;
  for (int l = 0; l < kLanes; ++l) count += counts[l];
  return count;
}

template <class T>
int64_t list_kept(const T* x, int64_t n, const Kept& kept, int64_t first_id, int64_t* ids) {
  const KeptTest is_kept(kept);
  int64_t count = 0;
  for_rare_vectors(
      x, n, [&](VecF v) { return is_kept.possibly(v); },
      [&](VecF v, int64_t i) {
        for_lanes(is_kept(v, i), [&](int l) { ids[count++] = first_id + i + l; });
      });
  return count;
}

template <class T>
constexpr SampleKernels<T> kSample = {&kept_block<T>,  &kept_mass<T>, &block_maxima<T>,
                                      &add_to_bins<T>, &list_bin<T>,  &count_kept<T>,
                                      &list_kept<T>};

}  // namespace fastrl::FASTRL_SIMD
