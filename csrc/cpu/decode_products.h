// The two products of decode_attention, of queries with keys and of weights with values, over a
// tile of keys; and exp and tanh. Included by kernels_*.cpp after simd.h and simd_doubles.h.
//
// Queries are taken in fours, padded with zeros, and one that is left over by itself; in a tile
// only the vectors that hold a key are worked on. Either way a query takes the same steps.

namespace fastrl::FASTRL_SIMD {

template <class T>
struct DecodeVectors {
  typedef VecF Vec;
  static constexpr int kLanesOf = kLanes;
};
template <>
struct DecodeVectors<double> {
  typedef VecD Vec;
  static constexpr int kLanesOf = kDoubles;
};

constexpr int kTogether = 4;                          // queries
constexpr int kVectors = FASTRL_LANES == 16 ? 4 : 2;  // so that all sums stay in registers

template <class T>
FASTRL_INLINE VecF load_wide(const T* p) {
  return load(p);
}
FASTRL_INLINE VecD load_wide(const double* p) { return load_doubles(p); }
FASTRL_INLINE void store_wide(double* p, VecD v) { store_doubles(p, v); }
template <class T>
FASTRL_INLINE void store_wide(T* p, VecF v) {
  store(p, v);
}
FASTRL_INLINE VecF larger(VecF a, VecF b) { return max(a, b); }
FASTRL_INLINE VecD larger(VecD a, VecD b) { return a > b ? a : b; }  // b where a is NaN
FASTRL_INLINE VecF splat_like(VecF, float x) { return x - VecF{}; }
FASTRL_INLINE VecD splat_like(VecD, double x) { return x - VecD{}; }

// Lanes in blocks of W, from a and b by turns: those at even places, or those at odd ones.
template <int W, bool kOdd, int N, class V, int... I>
FASTRL_INLINE V every_other(V a, V b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b,
                                 (kOdd ? (I & W ? N + I : I + W) : (I & W ? N + I - W : I))...);
#else
  typedef typename std::conditional<sizeof(a[0]) == 8, VecL, VecI>::type Index;
  return __builtin_shuffle(a, b,
                           Index{(kOdd ? (I & W ? N + I : I + W) : (I & W ? N + I - W : I))...});
#endif
}

template <int W, int N, class V>
FASTRL_INLINE void transpose(V* rows) {
  if constexpr (W < N) {
    constexpr auto lanes = std::make_integer_sequence<int, N>();
    for (int i = 0; i < N; ++i) {
      if (i & W) continue;
      const V a = rows[i], b = rows[i + W];
      rows[i] = every_other<W, false, N>(a, b, lanes);
      rows[i + W] = every_other<W, true, N>(a, b, lanes);
    }
    transpose<2 * W, N>(rows);
  }
}

// One vector of a row of `width`, zeros behind its end.
template <class T>
FASTRL_INLINE auto load_part(const T* row, int64_t at, int64_t width) {
  constexpr int N = DecodeVectors<T>::kLanesOf;
  if (at + N <= width) return load_wide(row + at);
  T part[N] = {};
  for (int64_t i = at; i < width; ++i) part[i - at] = row[i];
  return load_wide(part);
}

// Keys and values that will be read soon, asked for while something else is done: left to the
// processor's own foresight, a cache that lies in memory is read at half the speed.
template <class T>
struct Ahead {
  const DecodeBlock<T>& block;
  int64_t tile;

  FASTRL_INLINE void fetch(int64_t row, int64_t at) const {
    if (tile + row >= block.count) return;
    __builtin_prefetch(block.keys + (tile + row) * block.key_stride + at, 0, 2);
    __builtin_prefetch(block.values + (tile + row) * block.value_stride + at, 0, 2);
  }
  FASTRL_INLINE void fetch_all() const {
    const int64_t rows = std::min<int64_t>(kDecodeTile, block.count - tile);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t d = 0; d < block.width; d += 64 / sizeof(T)) fetch(row, d);
    }
  }
};

// keys [count, width] to [width, kDecodeTile], zeros behind the last one up to a whole vector.
template <class T>
inline void pack_keys(const T* keys, int64_t stride, int64_t count, int64_t width,
                      const Ahead<T>& ahead, Wide<T>* out) {
  typedef typename DecodeVectors<T>::Vec Vec;
  constexpr int N = DecodeVectors<T>::kLanesOf;
  for (int64_t j = 0; j < kDecodeTile; j += N) {
    if (j >= count) {
      if (ahead.tile >= ahead.block.count) return;  // nothing to fetch either
      for (int64_t d = 0; d < width; d += N) {
        for (int i = 0; i < N; ++i) ahead.fetch(j + i, d);
      }
      continue;
    }
    for (int64_t d = 0; d < width; d += N) {
      Vec rows[N];
      for (int i = 0; i < N; ++i) {
        ahead.fetch(j + i, d);
        rows[i] = j + i < count ? load_part(keys + (j + i) * stride, d, width) : Vec{};
      }
      transpose<1, N>(rows);
      for (int i = 0; i < N; ++i) store_wide(out + (d + i) * kDecodeTile + j, rows[i]);
    }
  }
}

// rows [count, width] to [count, padded_width].
template <class T>
inline void pack_row(const T* row, int64_t width, Wide<T>* out) {
  constexpr int N = DecodeVectors<T>::kLanesOf;
  for (int64_t d = 0; d < width; d += N) store_wide(out + d, load_part(row, d, width));
}

// scores[r][j] = <query r, key j> of R queries with C vectors of keys.
template <int R, int C, class Vec, int N, class Num>
FASTRL_INLINE void multiply_vectors(const Num* query, int64_t query_stride, const Num* keys,
                                    int64_t begin, int64_t end, Num* scores) {
  Vec sum[R][C] = {};
  for (int64_t d = begin; d < end; ++d) {
    Vec k[C];
    for (int v = 0; v < C; ++v) k[v] = load_wide(keys + d * kDecodeTile + v * N);
    for (int r = 0; r < R; ++r) {
      const Vec q = splat_like(Vec{}, query[r * query_stride + d]);
      for (int v = 0; v < C; ++v) sum[r][v] += q * k[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < C; ++v) {
      Num* const at = scores + r * kDecodeTile + v * N;
      store_wide(at, begin == 0 ? sum[r][v] : load_wide(at) + sum[r][v]);
    }
  }
}

// The same with the first `limit` keys of a tile; over a great width the sums of kSummed products
// each, added up, which rounds less than one long sum.
template <int R, class Vec, int N, class Num>
inline void multiply_keys(const Num* query, int64_t query_stride, const Num* keys, int64_t width,
                          int64_t limit, Num* scores) {
  constexpr int64_t kSummed = 64;
  for (int64_t begin = 0; begin < width; begin += kSummed) {
    const int64_t end = std::min(begin + kSummed, width);
    int64_t j = 0;
    for (; j + kVectors * N <= limit; j += kVectors * N) {
      multiply_vectors<R, kVectors, Vec, N>(query, query_stride, keys + j, begin, end, scores + j);
    }
    for (; j < limit; j += N) {
      multiply_vectors<R, 1, Vec, N>(query, query_stride, keys + j, begin, end, scores + j);
    }
  }
}

// The same of one query with keys [count, width] as they lie: to turn them would take longer than
// the products.
template <class T>
inline void multiply_lone(const Wide<T>* query, const T* keys, int64_t stride, int64_t count,
                          int64_t width, const Ahead<T>& ahead, Wide<T>* scores) {
  typedef typename DecodeVectors<T>::Vec Vec;
  constexpr int N = DecodeVectors<T>::kLanesOf;
  for (int64_t j = 0; j < count; j += N) {
    Vec sums[N];
    for (int i = 0; i < N; ++i) {
      sums[i] = Vec{};
      if (j + i >= count) continue;
      for (int64_t d = 0; d < width; d += N) {
        ahead.fetch(j + i, d);
        sums[i] += load_wide(query + d) * load_part(keys + (j + i) * stride, d, width);
      }
    }
    transpose<1, N>(sums);
    for (int step = N / 2; step; step /= 2) {
      for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
    }
    store_wide(scores + j, sums[0]);
  }
}

// sums[r][d] = shrink[r] sums[r][d] + sum_j weights[r][j] values[j][d], for C vectors from d.
template <int R, int C, class Vec, int N, class Num>
FASTRL_INLINE void add_values(const Num* weights, const Num* shrink, const Num* values,
                              int64_t value_stride, int64_t count, Num* sums, int64_t sum_stride) {
  Vec sum[R][C] = {};
  for (int64_t j = 0; j < count; ++j) {
    Vec x[C];
    for (int c = 0; c < C; ++c) x[c] = load_wide(values + j * value_stride + c * N);
    for (int r = 0; r < R; ++r) {
      const Vec w = splat_like(Vec{}, weights[r * kDecodeTile + j]);
      for (int c = 0; c < C; ++c) sum[r][c] += w * x[c];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      Num* const at = sums + r * sum_stride + c * N;
      store_wide(at, load_wide(at) * splat_like(Vec{}, shrink[r]) + sum[r][c]);
    }
  }
}

struct DecodeExp {
  ExpOf<false> floats{1.0};

  FASTRL_INLINE VecF operator()(VecF d) const { return floats(floats.clamp(d)); }
  FASTRL_INLINE VecD operator()(VecD d) const { return exp_doubles(d); }
};

// By an odd polynomial near 0, where 1 - exp(-2 |x|) would cancel.
FASTRL_INLINE VecF tanh_of(VecF x, const DecodeExp& exp) {
  const VecF size = x < 0.0f ? -x : x, e = exp(-2.0f * size);
  VecF far = (1.0f - e) / (1.0f + e);
  far = x < 0.0f ? -far : far;
  const VecF z = x * x;
  VecF p = -5.70498872745e-3f * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return size < 0.625f ? p * z * x + x : far;
}
FASTRL_INLINE VecD tanh_of(VecD x, const DecodeExp& exp) {
  const VecD size = x < 0.0 ? -x : x, e = exp(-2.0 * size);
  VecD far = (1.0 - e) / (1.0 + e);
  far = x < 0.0 ? -far : far;
  const VecD z = x * x;  // Taylor's series: below 1/16 its next term is 1e-17 of it
  VecD p = -1382.0 / 155925.0 * z + 62.0 / 2835.0;
  p = p * z - 17.0 / 315.0;
  p = p * z + 2.0 / 15.0;
  p = p * z - 1.0 / 3.0;
  return size < 0.0625 ? p * z * x + x : far;
}

// 1 - tanh(x)^2, without the difference, which cancels where tanh is close to 1.
template <class Vec>
FASTRL_INLINE Vec tanh_slope(Vec x, const DecodeExp& exp) {
  const Vec e = exp(x < 0 ? 2 * x : -2 * x), sum = 1 + e;
  return 4 * e / (sum * sum);
}

}  // namespace fastrl::FASTRL_SIMD
